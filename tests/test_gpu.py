"""What only a GPU can show; skipped elsewhere."""

import pytest
import torch

from tests.helpers import FAMILIES, compressed, left_padded_batch, random_windows, tiny_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@torch.no_grad()
@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("implementation", [None, "static"], ids=["growing", "compiled, fixed capacity"])
def test_greedy_tokens_equal_on_the_gpu(family, implementation):
    model = tiny_model(family).cuda()
    latent = compressed(model).model
    batch = {name: tensor.cuda() for name, tensor in left_padded_batch(model).items()}
    expected = model.generate(**batch, max_new_tokens=32, do_sample=False)
    got = latent.generate(**batch, max_new_tokens=32, do_sample=False, cache_implementation=implementation)
    assert torch.equal(expected, got)


@torch.no_grad()
def test_whitening_on_the_gpu_agrees_with_the_cpu():
    model = tiny_model("llama")
    ids = random_windows(model, 2, 30)
    options = {"ratio": 0.5, "decompose_method": "whiten", "search_method": "fisher_uniform"}
    on_cpu = compressed(model, **options)
    on_gpu = compressed(tiny_model("llama").cuda(), **options)
    assert on_cpu.plan == on_gpu.plan
    assert torch.allclose(on_cpu.model(ids).logits, on_gpu.model(ids.cuda()).logits.cpu(), atol=1e-3)
