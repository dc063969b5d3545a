"""What tests run in processes that torch.multiprocessing starts, which import it by name."""

import torch
from support import Net

import bssn_fast


def train_and_send(state, x, queue, done):
    """Build the model anew, load its state, take one step and send what came of it."""
    torch.set_num_threads(1)
    model = bssn_fast.apply(Net())
    model.load_state_dict(state)
    model(x).sum().backward()
    queue.put((model.state_dict(), {n: p.grad for n, p in model.named_parameters()}))
    done.wait(60)  # shared memory lives as long as this process


def step(model, x):
    """Take one step of two forwards."""
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    optimizer.zero_grad()
    (model(x).relu().sum() - model(x).square().sum()).backward()
    optimizer.step()


def step_in_process(rank, model, x):
    """Take one step with a model that lies in shared memory."""
    torch.set_num_threads(1)
    step(model, x)
