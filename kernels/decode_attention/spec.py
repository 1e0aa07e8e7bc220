"""Shapes on which every implementation of the op is checked, its tolerance, and its cost."""

from dataclasses import dataclass

# Latents of a group's keys at most that the decode kernel for compute capability 9 takes, of which it adds up products
# of whole numbers in 32 bits (`hopper.whole`: 512 * 128 * 32,512 < 2^31), and with which it is fast.
MOST_KEY_RANK, FAST_KEY_RANK = 512, 256


@dataclass(frozen=True)
class Shape:
    """One call of the op; ranks may differ from group to group."""

    batch: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    queries: int
    length: int
    key_ranks: tuple[int, ...]
    value_ranks: tuple[int, ...]

    def bytes_read(self, itemsize: int) -> int:
        """Bytes of latents that any implementation has to read."""
        return self.batch * self.length * (sum(self.key_ranks) + sum(self.value_ranks)) * itemsize

    def flops(self) -> int:
        """Multiply-adds times two of rebuilding keys, scores and absorbed values."""
        key_group_dim = self.num_kv_heads // len(self.key_ranks) * self.head_dim
        rebuild = sum(self.key_ranks) * key_group_dim
        scores = self.num_heads * self.head_dim * self.queries
        heads_per_value_group = self.num_heads // len(self.value_ranks)
        values = sum(self.value_ranks) * heads_per_value_group * self.queries
        return 2 * self.batch * self.length * (rebuild + scores + values)


# Ragged on purpose: lengths that are no multiple of any block, uneven ranks, one value group over several key groups.
SHAPES = (
    Shape(1, 4, 4, 64, 1, 1, (64, 64), (96, 32)),
    Shape(2, 8, 4, 64, 1, 63, (96, 32), (160,)),
    Shape(2, 6, 2, 96, 2, 129, (48, 16), (80, 96)),
    Shape(1, 8, 8, 128, 2, 139, (112, 16, 32, 128), (256, 48)),
    Shape(1, 12, 4, 64, 1, 70, (32, 48), (32, 64)),
)

# The heads of Llama-2-7B, Llama-3-8B and Qwen2-7B, too large for an interpreter.
REAL_SHAPES = (
    Shape(1, 32, 32, 128, 1, 4097, (128,) * 8, (384,) * 8),
    Shape(2, 32, 8, 128, 1, 3001, (112, 256), (384, 512)),
    Shape(1, 28, 4, 128, 2, 1030, (272,), (512,)),
)

# What the kernel for Hopper takes: one and several queries per kv head, all counts of kv heads, ragged in all else.
HOPPER_SHAPES = (
    Shape(2, 32, 8, 128, 1, 1001, (128, 128), (384, 256)),
    Shape(2, 16, 8, 128, 2, 517, (112, 64), (384, 272)),
    Shape(1, 8, 8, 64, 1, 200, (128, 32), (96, 128)),
    Shape(2, 8, 8, 96, 1, 333, (64, 128), (128, 96)),
    Shape(1, 12, 4, 128, 1, 300, (128,), (256,)),
    Shape(1, 12, 6, 128, 1, 700, (32, 96), (512, 128)),
    Shape(3, 4, 2, 64, 1, 131, (128, 16), (32, 128)),
    Shape(1, 6, 6, 128, 1, 210, (64, 96), (96, 192)),
    Shape(1, 28, 4, 128, 1, 390, (96,), (256,)),
    Shape(1, 2, 2, 128, 1, 1, (128,) * 2, (128,) * 2),
    Shape(2, 14, 2, 64, 1, 260, (128,), (128,)),
    Shape(1, 6, 3, 64, 1, 190, (64,), (192,)),
    Shape(1, 8, 4, 96, 1, 330, (64, 128), (128, 192)),
    Shape(1, 10, 5, 128, 1, 300, (64,), (256,)),
    # More latents than half of the heads' factors have room for, and values of several key groups in the same latents.
    Shape(2, 32, 8, 128, 1, 701, (256, 160), (256, 128)),
    Shape(1, 8, 8, 128, 1, 410, (192, 64), (256, 128)),
    Shape(2, 32, 8, 128, 1, 650, (128, 96), (640,)),
    Shape(1, 16, 4, 64, 1, 300, (128, 64), (192,)),
    Shape(2, 8, 8, 64, 1, 280, (64, 96), (320,)),
    Shape(1, 32, 8, 128, 1, 520, (256, 192), (256,)),
    Shape(1, 32, 8, 128, 1, 380, (192,), (256,)),
    Shape(1, 8, 4, 64, 1, 310, (192,), (128,)),
    # Several key groups whose heads one program has.
    Shape(2, 32, 8, 128, 1, 430, (128, 96, 64, 128), (256, 128)),
    Shape(1, 8, 8, 128, 1, 390, (64, 128, 96, 128), (256,)),
    Shape(1, 16, 8, 96, 1, 333, (64,) * 8, (192, 256)),
)

# Largest relative error ||out - ref|| / ||ref|| against float64: rounding of the inputs' dtype over sums of a few
# hundred terms, with room for one further rounding of the probabilities.
TOLERANCE = {"float32": 2e-5, "bfloat16": 3e-2, "float16": 4e-3}
