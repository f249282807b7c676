"""What makes a GPU fast and a CPU can show: no host reads, no mask, one graph for all layers."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from algpt2 import ALGPT2Config, ALGPT2LMHeadModel


class Operators(TorchDispatchMode):
    """Records the names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.names.append(str(operator))
        return operator(*args, **(kwargs or {}))


def make_model(**changes):
    shape = {
        "vocab_size": 50, "n_positions": 16, "n_embd": 32, "n_layer": 12, "n_head": 2,
        "embedding_size": 16, "bos_token_id": 49, "eos_token_id": 49,
        "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0,
    }  # fmt: skip
    torch.manual_seed(0)
    return ALGPT2LMHeadModel(ALGPT2Config(**{**shape, **changes}))


def loss_of(model, rows):
    return model(rows, shift_labels=rows, skip_logits=True, use_cache=False).loss


@pytest.mark.parametrize("training", [True, False])
def test_a_pass_over_plain_rows_reads_nothing_from_the_device(training):
    model, rows = make_model().train(training), torch.arange(32).view(2, 16)
    with Operators() as run:
        loss = loss_of(model, rows)
        loss.backward()
    assert any("scaled_dot_product" in name for name in run.names)
    assert [name for name in run.names if "_local_scalar_dense" in name] == []


def test_the_graph_of_plain_rows_has_no_mask():
    model, calls = make_model().transformer, []

    def keep(graph, inputs):
        attention = torch.nn.functional.scaled_dot_product_attention
        calls.extend(node.kwargs for node in graph.graph.nodes if node.target is attention)
        return graph

    rows = torch.arange(32).view(2, 16)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=keep, fullgraph=True)
    states = [way(rows, use_cache=False).last_hidden_state for way in (compiled, model)]
    assert torch.equal(*states)
    assert len(calls) == model.config.n_layer
    assert all(call["attn_mask"] is None and call["is_causal"] is True for call in calls)
