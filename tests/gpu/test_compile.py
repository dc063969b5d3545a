"""torch.compile on a GPU, also where it replays CUDA graphs."""

import copy

import pytest
import torch
from support import Net, images, norms, vectors_of
from ways import SINGLE

import bssn_fast


@pytest.mark.parametrize("way", SINGLE, ids="-".join, indirect=True)
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("inside", [False, True], ids=["model", "step"])
def test_training_is_that_of_the_model(backend, mode, inside):
    """Vectors change in place in the graph's own memory, and several forwards come before one backward."""
    torch._dynamo.reset()
    model = bssn_fast.apply(Net().cuda(), backend=backend)
    twin = copy.deepcopy(model)

    def loss(net, x, y):
        return net(x).square().mean() - net(y).mean()

    call = torch.compile(loss, mode=mode, fullgraph=True) if inside else loss
    compiled = model if inside else torch.compile(model, mode=mode, fullgraph=True)
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.05) for net in (model, twin)]
    for step in range(20):
        x, y = images(4).cuda(), images(4).cuda()
        torch.compiler.cudagraph_mark_step_begin()
        losses = [call(compiled, x, y), loss(twin, x, y)]
        for value, optimizer in zip(losses, optimizers, strict=True):
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
        torch.testing.assert_close(losses[0].detach(), losses[1].detach(), rtol=2e-2, atol=2e-3, msg=f"step {step}")
    for name, vector in vectors_of(twin).items():
        torch.testing.assert_close(vectors_of(model)[name], vector, rtol=2e-2, atol=5e-3)
    for name, sigma in bssn_fast.sigma(model).items():
        torch.testing.assert_close(sigma, bssn_fast.sigma(twin)[name], rtol=1e-2, atol=1e-3)
    model.eval(), twin.eval()
    before = vectors_of(model)
    with torch.no_grad():
        for _ in range(4):
            torch.testing.assert_close(compiled(x), twin(x), rtol=2e-2, atol=1e-2)
    assert all(torch.equal(v, before[f"{n}.{k}"]) for n, p in norms(model).items() for k, v in p.named_buffers())
