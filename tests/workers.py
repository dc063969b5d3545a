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
