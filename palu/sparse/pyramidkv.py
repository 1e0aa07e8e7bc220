"""PyramidKV (arXiv 2406.02069): SnapKV's votes, budgets that fall over the layers."""

from palu.sparse.snapkv import SnapKV


class PyramidKV(SnapKV):
    """The last layer chooses a share of 1 / beta, the first as many more than the mean as that is less."""

    def budget(self, layer: int, num_layers: int, length: int) -> int:
        """On a line from the first layer's to the last's (section 4.2); over all layers exactly the capacity each.

        Where the first layer's would exceed what there is, it takes all, and the last one what that leaves.
        """
        settings = self.settings
        window, mean = settings.window_size, settings.capacity_of(length) - settings.window_size
        last = max(settings.sink_tokens, int(mean / settings.pyramid_beta), 2 * mean - (length - window))
        # How far a layer is above the mean; its mirror image is as far below, so that rounding loses nothing.
        steepness = (mean - last) / max(1, num_layers - 1)
        above = num_layers - 1 - 2 * layer
        return window + mean + (1 if above > 0 else -1) * round(abs(above) * steepness)
