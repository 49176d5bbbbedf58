"""The model: Hugging Face's numbers, no leakage, one graph, honest counts."""
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import kernels
from huggingface import weights as hf_weights
from kernels.reference import attention as reference
from kernels.sdpa import sdpa, sdpa_backward
from model import SIZES, Encoder, ModelConfig, SequenceHead, TokenHead, segment_mean

LENGTHS = [1, 37, 12, 90, 64]


def pack(lengths, empty=0):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()] + [sum(lengths)] * empty, dtype=torch.int32)


def encoder(attention="sdpa", tied=False, **size):
    torch.manual_seed(0)
    shape = dict(n_layer=3, n_head=6, n_kv_head=2, n_embd=96, n_ffn=160) | size
    model = Encoder(ModelConfig(**shape, vocab_size=320, tied=tied), attention).eval()
    with torch.no_grad():       # weights large enough that every part matters
        for p in model.parameters():
            p.mul_(3.0 if p.ndim == 2 else 1.0).add_(0.1 * torch.randn_like(p) if p.ndim == 1 else 0.0)
    return model


def named_as_hugging_face(ours):
    return hf_weights.write_weights(ours.state_dict(), ours.config) | {"lm_head.weight": ours.lm_head.weight}


def copy_into(hf, ours):
    missing, unexpected = hf.load_state_dict(named_as_hugging_face(ours), strict=False)
    assert not unexpected and all("rotary" in name for name in missing)
    return hf.eval()


def hf_config(kind, c, causal=False):
    return kind.from_dict(hf_weights.write_config(c, causal) | dict(bos_token_id=1, eos_token_id=2, pad_token_id=None), attn_implementation="sdpa")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("heads", [(6, 2), (6, 6), (4, 1)])
@pytest.mark.parametrize("causal", [False, True])
def test_fp32_logits_equal_hugging_face(tied, heads, causal):
    """Bidirectional: EuroBertForMaskedLM; causal: LlamaForCausalLM, the same block under the other mask."""
    transformers = pytest.importorskip("transformers")
    ours = encoder(tied=tied, n_head=heads[0], n_kv_head=heads[1])
    config, kind = (transformers.LlamaConfig, transformers.LlamaForCausalLM) if causal else \
        (transformers.EuroBertConfig, transformers.EuroBertForMaskedLM)
    with torch.no_grad():
        hf = copy_into(kind(hf_config(config, ours.config, causal)), ours)
        tokens, cu = torch.randint(0, 320, (sum(LENGTHS) + 300,)), pack([*LENGTHS, 300])
        packed = ours.logits(ours(tokens, cu, causal))
        for s, e in zip(cu, cu[1:]):                    # Hugging Face sees each sequence alone, ours all of them at once
            theirs = hf(input_ids=tokens[None, s:e]).logits[0]
            assert theirs.abs().max() > 0.5
            assert (packed[s:e] - theirs).abs().max() <= 1e-5


@pytest.mark.parametrize("kind", ["Sequence", "Token"])
def test_fine_tuning_loss_and_gradients_equal_hugging_faces_padded_model(kind):
    transformers = pytest.importorskip("transformers")
    ours, labels = encoder(), 5
    head = {"Sequence": SequenceHead, "Token": TokenHead}[kind](ours.config.n_embd, labels)
    config = hf_config(transformers.EuroBertConfig, ours.config)
    config.num_labels, config.classifier_pooling, config.pad_token_id = labels, "mean", 0
    hf = getattr(transformers, f"EuroBertFor{kind}Classification")(config)
    state = {k: v for k, v in named_as_hugging_face(ours).items() if k != "lm_head.weight"} | head.state_dict()
    missing, unexpected = hf.load_state_dict(state, strict=False)
    assert not unexpected and all("rotary" in name for name in missing)

    tokens, cu, longest = torch.randint(3, 320, (sum(LENGTHS),)), pack(LENGTHS), max(LENGTHS)
    padded, mask = (torch.zeros(len(LENGTHS), longest, dtype=torch.long) for _ in range(2))
    targets = torch.randint(0, labels, (len(LENGTHS) if kind == "Sequence" else sum(LENGTHS),))
    padded_targets = targets if kind == "Sequence" else torch.full_like(padded, -100)
    for row, (s, e) in enumerate(zip(cu, cu[1:])):
        padded[row, :e - s], mask[row, :e - s] = tokens[s:e], 1
        if kind == "Token":
            padded_targets[row, :e - s] = targets[s:e]
    loss = torch.nn.functional.cross_entropy(head(ours(tokens, cu, False), cu), targets)
    theirs = hf(input_ids=padded, attention_mask=mask, labels=padded_targets).loss
    loss.backward()
    theirs.backward()
    assert abs(loss.item() - theirs.item()) <= 1e-5
    grads = {k: v.grad for k, v in hf.named_parameters()}
    assert all((p.grad - grads[name]).norm() <= 1e-5 * grads[name].norm().clamp(min=1e-3) for name, p in head.named_parameters())
    for name, of_block in (("embed_tokens", ours.embedding.weight.grad), ("norm", ours.norm.weight.grad),
                           ("layers.0.mlp.down_proj", ours.blocks[0].mlp.down.weight.grad),
                           ("layers.2.self_attn.o_proj", ours.blocks[2].attention.out.weight.grad)):
        there = grads[f"model.{name}.weight"]
        assert (of_block - there).norm() <= 1e-5 * there.norm()


def test_the_mean_of_a_sequence_is_its_own_and_zero_of_nothing():
    hidden, cu = torch.randn(sum(LENGTHS), 8, requires_grad=True), pack(LENGTHS, empty=2)
    mean = segment_mean(hidden, cu)
    for row, (s, e) in enumerate(zip(cu, cu[1:])):
        assert torch.allclose(mean[row], hidden[s:e].mean(0) if e > s else torch.zeros(8), atol=1e-6)
    mean.sum().backward()
    assert torch.allclose(hidden.grad, (1 / torch.tensor(LENGTHS).float()).repeat_interleave(torch.tensor(LENGTHS))[:, None].expand(-1, 8))


@pytest.mark.parametrize("attention", ["sdpa", "reference"])
def test_clm_sees_no_later_token_and_mlm_does(attention):
    model, cu, tokens = encoder(attention), pack([40, 30]), torch.randint(0, 320, (70,))
    for t in (0, 17, 39, 40, 69):
        changed = tokens.clone()
        changed[t] = (changed[t] + 1) % 320
        start, end = (0, 40) if t < 40 else (40, 70)
        for causal in (True, False):
            with torch.no_grad():
                moved = (model(tokens, cu, causal) != model(changed, cu, causal)).any(1)
            assert moved[t]
            assert not moved[:start].any() and not moved[end:].any()       # neither ever crosses a cut
            if causal:
                assert not moved[start:t].any()
            else:
                assert moved[start:end].all()


@pytest.mark.parametrize("causal", [False, True])
def test_packed_equals_alone(causal):
    model, cu, tokens = encoder(), pack(LENGTHS, empty=3), torch.randint(0, 320, (sum(LENGTHS),))
    with torch.no_grad():
        packed = model(tokens, cu, causal)
        for s, e in zip(cu, cu[1:]):
            if e > s:
                alone = model(tokens[s:e], torch.tensor([0, e - s], dtype=torch.int32), causal)
                assert (packed[s:e] - alone).abs().max() <= 1e-5


@pytest.mark.parametrize("heads, dim", [((6, 2), 64), ((4, 4), 32), ((3, 1), 96)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 1e-2)])
def test_sdpa_equals_the_dense_reference_values_and_gradients(heads, dim, causal, dtype, bound):
    torch.manual_seed(1)
    lengths = [*LENGTHS, 300, 530]      # beyond one block of queries, too
    cu = pack(lengths, empty=2)
    q, k, v = (torch.randn(sum(lengths), h, dim).to(dtype).requires_grad_() for h in (heads[0], heads[1], heads[1]))
    grad = torch.randn_like(q)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    ours, theirs = kernels.attention(q, k, v, cu, causal, "sdpa"), reference(*exact, cu, causal)
    ours.backward(grad)
    theirs.backward(grad.double())
    for a, b in [(ours, theirs), *zip((q.grad, k.grad, v.grad), (x.grad for x in exact))]:
        assert (a.double() - b).norm() / b.norm() <= bound


@pytest.mark.parametrize("heads", [(6, 6), (6, 2)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_sentences_computed_together_are_each_alone(heads, causal, dtype, bound, poisoned):
    """Forty short sequences of all lengths, empty ones and a long one; a NaN in one of them stays there."""
    torch.manual_seed(0)
    lengths = [*range(1, 40), 300, 0, 64, 64, 63, 127, 128, 129, 2, 16, 17]
    cu_seqlens, spoilt = pack(lengths), sum(lengths[:20])
    inputs = [torch.randn(sum(lengths), h, 32).to(dtype).requires_grad_() for h in (heads[0], heads[1], heads[1])]
    grad = torch.randn(sum(lengths), heads[0], 32).to(dtype)
    out = kernels.attention(*inputs, cu_seqlens, causal, "sdpa")
    found = [out, *torch.autograd.grad(out, inputs, grad)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected = reference(*exact, cu_seqlens, causal)
    for a, b in zip(found, [expected, *torch.autograd.grad(expected, exact, grad.double())]):
        assert ((a.double() - b).norm() / b.norm()).item() < bound
    broken = [x.detach().clone().requires_grad_() for x in inputs]
    for x in broken:
        x.data[spoilt] = float("nan")
    out = kernels.attention(*broken, cu_seqlens, causal, "sdpa")
    for a, b in zip([out, *torch.autograd.grad(out, broken, grad)], found):
        others = torch.ones(len(a), dtype=torch.bool)
        others[spoilt:spoilt + lengths[20]] = False
        assert torch.equal(a[others], b[others]) and a[spoilt].isnan().any()


def test_sdpa_is_a_well_behaved_operator():
    cu, simple = pack([5, 9]), ("test_schema", "test_faketensor")
    q, k, v = (torch.randn(14, h, 8, requires_grad=True) for h in (4, 2, 2))
    torch.library.opcheck(sdpa, (q, k, v, cu, True, True))
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = (x.detach().to(dtype) for x in (q, k, v))
        torch.library.opcheck(sdpa, (q, k, v, cu, False, True), test_utils=simple)
        out, kept = sdpa(q, k, v, cu, False, True)
        torch.library.opcheck(sdpa_backward, (out, q, k, v, out, kept, cu, False), test_utils=simple)


@pytest.mark.parametrize("causal", [False, True])
def test_hidden_states_at_positions_are_those_of_the_whole(causal):
    model, cu, tokens = encoder(), pack(LENGTHS), torch.randint(0, 320, (sum(LENGTHS),))
    positions = torch.tensor([0, 3, 3, 40, sum(LENGTHS) - 1, 0, 0])       # padding of a fixed capacity repeats 0
    grad = torch.randn(len(positions), model.config.n_embd)
    found = []
    for hidden in (model(tokens, cu, causal, positions), model(tokens, cu, causal)[positions]):
        model.zero_grad()
        hidden.backward(grad)
        found.append([hidden] + [p.grad for p in model.parameters() if p.grad is not None])
    assert len(found[0]) == len(found[1]) == len(list(model.parameters()))          # all but the head, and the output
    for some, of_all in zip(*found):
        assert (some - of_all).norm() <= 1e-5 * of_all.norm()


def test_a_block_compiles_to_one_graph_a_mask_shared_by_all_layers_and_one_for_the_last():
    torch._dynamo.reset()
    model, cu, tokens = encoder(), pack(LENGTHS), torch.randint(0, 320, (sum(LENGTHS),))
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward
    eager = [model(tokens, cu, causal) for causal in (True, False)]
    positions = torch.arange(0, sum(LENGTHS), 3)
    for block in model.blocks:
        block.compile(backend=backend, fullgraph=True, dynamic=False)
    for _ in range(2):
        for causal, expected in zip((True, False), eager):
            hidden = model(tokens, cu, causal)
            assert torch.equal(hidden, expected)
    assert len(graphs) == 2
    for causal, expected in zip((True, False), eager):
        assert (model(tokens, cu, causal, positions) - expected[positions]).abs().max() <= 1e-5
    assert len(graphs) == 4
    torch._dynamo.reset()


def test_parameter_counts_are_the_papers():
    expected = {"210m": (113_265_408, 211.8, 310.3), "610m": (460_123_776, 607.9, 755.6), "1b": (966_230_208, 1187.9, 1409.5)}
    for size, (body, encoder_m, total_m) in expected.items():
        with torch.device("meta"):
            n = Encoder(ModelConfig(**SIZES[size], vocab_size=128_256)).num_parameters()
        assert n["body"] == body and round(n["encoder"] / 1e6, 1) == encoder_m and round(n["total"] / 1e6, 1) == total_m
        c = ModelConfig(**SIZES[size], vocab_size=128_256)
        assert c.head_dim == {"210m": 64, "610m": 64, "1b": 96}[size]


def test_initial_weights_are_normal_002_without_depth_scaling():
    torch.manual_seed(0)
    model = Encoder(ModelConfig(**SIZES["demo"], vocab_size=4096))
    for name, p in model.named_parameters():
        if p.ndim == 2:
            assert abs(p.std().item() - 0.02) < 0.0005 and abs(p.mean().item()) < 0.001, name
        else:
            assert (p == 1).all()


def test_flops_are_the_products_that_run():
    """Against PyTorch's own counter on the dense reference, where one sequence is exactly its L^2 pairs."""
    model, tokens = encoder("reference", n_kv_head=6), torch.randint(0, 320, (64,))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.logits(model(tokens, pack([64]), False, torch.arange(20)))
    assert 3 * counter.get_total_flops() == model.flops([64], 20, causal=False)
    full, half = model.flops([64], 0, False), model.flops([64], 0, True)
    attention = 3 * 4 * model.config.n_layer * model.config.n_embd * 64 ** 2
    assert (full - half) / attention == pytest.approx(63 / 128)         # the causal mask leaves 65 of 128 pairs
    assert model.flops([32, 32], 0, False) < full                       # sequences attend to themselves only


def test_unknown_attention_names_the_known_ones():
    with pytest.raises(ValueError, match="expected auto or one of triton, varlen, sdpa, reference"):
        encoder("flash9")
