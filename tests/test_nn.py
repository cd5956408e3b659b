"""The layers of ref/nn.py and the blocks: derivatives, other forms of the same map, precision, odd
input."""

import tracemalloc

import numpy as np
import pytest
import strict
from conftest import error

from ref import Error, backend, block, gradcheck, nn

PAIRS = gradcheck.nn_pairs(np.random.default_rng(0))


@pytest.mark.parametrize("name", PAIRS)
def test_gradients(name):
    forward, backward, arrays = PAIRS[name]
    errors = gradcheck.check_pair(forward, backward, arrays)
    assert errors and max(errors.values()) < gradcheck.TOLERANCE, errors


@pytest.mark.parametrize("name", PAIRS)
def test_twins_are_the_readable_form_and_float32_stays_float32(name, plain):
    forward, backward, arrays = PAIRS[name]
    rng = np.random.default_rng(1)
    dy = rng.standard_normal(np.shape(forward(arrays)[0]))

    def results(arrays, dy):
        y, cache = forward(arrays)
        return [np.asarray(y), *backward(dy, cache).values()]

    exact, readable = results(arrays, dy), plain(results, arrays, dy)
    assert max(map(error, exact, readable)) < 1e-13
    low = {"float64": "float32", "complex128": "complex64"}
    single = {n: a.astype(low[a.dtype.name]) for n, a in arrays.items()}
    for run in (results, lambda *args: plain(results, *args)):
        rounded = run(single, dy.astype("float32"))
        kept = [low[r.dtype.name] for r in exact]
        assert [r.dtype.name for r in rounded] == kept
        assert max(map(error, rounded, exact)) < 1e-5


@pytest.mark.parametrize("L", [1, 2, 3, 7, 64, 127])
def test_convolutions_are_their_sums(L):
    rng = np.random.default_rng(L)
    x = rng.standard_normal((2, L, 3))
    t = np.arange(L)
    for mode, K in (
        ("causal", L),
        ("causal", 2 * L + 1),
        ("causal", 1),
        ("circular", L),
        ("circular", 1),
        ("two-sided", 2 * L - 1),
    ):
        k = rng.standard_normal((3, K))
        lag = t[:, None] - t[None, :]
        taps = np.concatenate([k, np.zeros((3, 2 * L))], axis=1)
        if mode == "causal":
            M = np.where(lag >= 0, taps[:, lag], 0)
        elif mode == "circular":
            M = taps[:, lag % L]
        else:
            M = k[:, L - 1 + lag]
        y, _ = nn.fft_conv_forward(x, k, mode)
        assert error(y, np.einsum("dts,bsd->btd", M, x)) < 1e-13


def test_convolutions_refuse_kernels_that_do_not_fit():
    x = np.zeros((1, 4, 2))
    for mode, K in (("circular", 5), ("two-sided", 8), ("sideways", 4)):
        with pytest.raises(Error):
            nn.fft_conv_forward(x, np.zeros((2, K)), mode)


@pytest.mark.parametrize("K", [1, 2, 4])
def test_short_convolution_step_by_step_and_cut_in_two(K):
    rng = np.random.default_rng(0)
    x, w, b = rng.standard_normal((2, 9, 3)), rng.standard_normal((3, 1, K)), rng.standard_normal(3)
    y, _ = nn.short_conv_forward(x, w, b)
    direct = b + sum(
        w[:, 0, K - 1 - i] * np.pad(x, ((0, 0), (i, 0), (0, 0)))[:, :9] for i in range(K)
    )
    assert error(y, direct) < 1e-14
    state = np.zeros((2, K - 1, 3))
    for t in range(9):
        y_t, state = nn.short_conv_step(x[:, t], state, w, b)
        assert error(y_t, y[:, t]) < 1e-14
    before = x[:, 5 - (K - 1) : 5]
    assert error(nn.short_conv_forward(x[:, 5:], w, b, before)[0], y[:, 5:]) < 1e-14


def test_activations_do_not_overflow(plain):
    x = np.array([-1e4, -100.0, -1.0, 0.0, 1.0, 100.0, 1e4])
    for dtype in ("float32", "float64"):
        for name in ("gelu", "gelu_tanh", "sigmoid", "silu", "softplus", "relu", "glu"):
            a = np.stack([x, x], axis=-1).astype(dtype)
            for run in (lambda f, *args: f(*args), plain):
                y, cache = run(getattr(nn, f"{name}_forward"), a)
                dx = run(getattr(nn, f"{name}_backward"), np.ones_like(y), cache)
                assert np.isfinite(y).all() and np.isfinite(dx).all(), (name, dtype)
    assert nn.softplus_forward(np.array([1e4]))[0] == 1e4


def test_cross_entropy_of_large_logits_and_of_nothing():
    logits = np.array([[1e4, 0.0], [-1e4, 1e4]])
    loss, cache = nn.softmax_cross_entropy_forward(logits, np.array([0, 1]))
    assert loss == 0 and not nn.softmax_cross_entropy_backward(1.0, cache).any()
    loss, cache = nn.softmax_cross_entropy_forward(logits, np.array([-1, -1]))
    assert loss == 0 and not nn.softmax_cross_entropy_backward(1.0, cache).any()


def test_only_consume_logits_destroys_its_input():
    rng = np.random.default_rng(0)
    logits, targets = rng.standard_normal((4, 5)), np.array([0, 1, -1, 4])
    before = logits.copy()
    loss, cache = nn.softmax_cross_entropy_forward(logits, targets)
    kept = nn.softmax_cross_entropy_backward(1.0, cache)
    assert (logits == before).all()
    other, cache = nn.softmax_cross_entropy_forward(logits, targets, consume_logits=True)
    assert other == loss and (nn.softmax_cross_entropy_backward(1.0, cache) == kept).all()
    assert (logits != before).any()


def cross_entropy_by_its_sums(logits, targets):
    """-> loss, gradient, correct, one target after the other, in longer floats"""
    rows, losses, correct = logits.reshape(-1, logits.shape[-1]).astype("longdouble"), [], []
    gradient, counted = np.zeros(rows.shape), [t for t in targets.ravel() if t != -1]
    for i, (row, target) in enumerate(zip(rows, targets.ravel(), strict=True)):
        correct.append(target != -1 and row.tolist().index(max(row.tolist())) == target)
        if target != -1:
            p = np.exp(row - row.max())
            losses.append(np.log(p.sum()) - (row - row.max())[target])
            gradient[i] = (p / p.sum() - (np.arange(len(row)) == target)) / len(counted)
    return sum(losses) / max(len(counted), 1), gradient.reshape(logits.shape), correct


def cross_entropy(logits, targets, dloss=1.0, **options):
    """-> loss, gradient, correct"""
    loss, cache = nn.softmax_cross_entropy_forward(logits, targets, **options)
    correct = nn.softmax_cross_entropy_correct(cache)
    return loss, nn.softmax_cross_entropy_backward(dloss, cache), correct


@pytest.mark.parametrize("V", [1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 1023, 1024, 1031, 2053])
def test_cross_entropy_of_any_vocabulary(V, plain):
    """Whole vectors and blocks of them, and what is left over"""
    rng = np.random.default_rng(V)
    logits = 3 * rng.standard_normal((3, 5, V))
    targets = rng.integers(0, V, (3, 5))
    targets[1, :2] = -1
    targets[0] = logits[0].argmax(axis=-1)
    for dtype, allowed in (("float64", 1e-14), ("float32", 2e-6)):
        x = logits.astype(dtype)
        x[2, 1], x[2, 2, : V // 2], x[2, 3, -1] = 0, -np.inf, 80
        targets[2, 2] = V - 1
        loss, gradient, correct = cross_entropy_by_its_sums(x, targets)
        for run in (lambda f, *args, **options: f(*args, **options), plain):
            for consume in (False, True):
                given = x.copy()
                found = run(cross_entropy, given, targets, consume_logits=consume)
                assert found[0].dtype == found[1].dtype == dtype
                assert abs(found[0] - loss) <= allowed * max(abs(loss), 1)
                assert np.abs(found[1] - gradient).max() <= allowed / 13
                assert found[2].shape == (3, 5) and found[2].ravel().tolist() == correct
                assert not found[1][1, :2].any() and not found[2][1, :2].any()
                assert (given is found[1]) == consume and (consume or (given == x).all())


def test_a_consumed_gradient_is_scaled_in_a_copy():
    rng = np.random.default_rng(0)
    logits, targets = rng.standard_normal((4, 5)), np.array([0, 1, -1, 4])
    expected = cross_entropy(logits, targets)[1]
    for dloss in (-2.0, 1.5, np.array(3.0)):
        _, cache = nn.softmax_cross_entropy_forward(logits.copy(), targets, consume_logits=True)
        scaled = nn.softmax_cross_entropy_backward(dloss, cache)
        assert error(scaled, expected * float(dloss)) < 1e-15 and scaled is not cache[0]
        assert (nn.softmax_cross_entropy_backward(1, cache) == expected).all()
    _, cache = nn.softmax_cross_entropy_forward(logits, targets)
    first = nn.softmax_cross_entropy_backward(1.0, cache)
    first[:] = 0
    assert (nn.softmax_cross_entropy_backward(1.0, cache) == expected).all()


def test_cross_entropy_of_odd_memory_layouts(plain):
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((4, 6, 19))
    targets = rng.integers(-1, 19, (4, 6))
    expected = cross_entropy(logits, targets)
    fixed = logits.copy()
    fixed.flags.writeable = False
    for odd in (np.asfortranarray(logits), np.repeat(logits, 2, axis=2)[..., ::2], fixed):
        for which in (targets, targets.astype("int32"), np.asfortranarray(targets)):
            for run in (lambda f, *args, **options: f(*args, **options), plain):
                for consume in (False, True):
                    found = run(cross_entropy, odd, which, consume_logits=consume)
                    assert all(map(lambda a, b: error(a, b) < 1e-14, found[:2], expected[:2]))
                    assert (found[2] == expected[2]).all() and (odd == logits).all()


def test_the_first_of_equal_logits_is_the_guess(plain):
    logits = np.zeros((4, 40))
    logits[2:, [7, 33]] = 2
    for run in (lambda f, *args: f(*args), plain):
        correct = run(cross_entropy, logits, np.array([0, 39, 7, 33]))[2]
        assert correct.tolist() == [True, False, True, False]


def test_logits_that_are_no_numbers_are_a_loss_that_is_none(plain):
    for run in (lambda f, *args: f(*args), plain):
        for V in (3, 16, 35):
            for at in (0, V - 1):
                for bad in (np.nan, np.inf):
                    logits = np.zeros((2, V))
                    logits[1, at] = bad
                    with np.errstate(invalid="ignore"):
                        assert np.isnan(run(cross_entropy, logits, np.array([0, 1]))[0])
                        loss, gradient, _ = run(cross_entropy, logits, np.array([0, -1]))
                    assert abs(loss - np.log(V)) < 1e-14 and not gradient[1].any()
        impossible = np.array([[0.0, -np.inf]])
        with np.errstate(divide="ignore"):
            loss, gradient, _ = run(cross_entropy, impossible, np.array([1]))
        assert loss == np.inf and gradient.tolist() == [[1, -1]]


def test_targets_that_are_no_class(plain):
    logits = np.zeros((2, 5))
    for run in (lambda f, *args, **more: f(*args, **more), plain):
        for target, ignore in ((5, -1), (-2, -1), (2**40, -1), (-1, -100), (-1, 0)):
            with pytest.raises(Error, match=f"target {target} is outside the 5 classes"):
                run(cross_entropy, logits, np.array([1, target]), ignore=ignore)
        for ignore in (-100, 7):  # no class, and yet allowed
            assert run(cross_entropy, logits, np.array([1, ignore]), ignore=ignore)[0] > 1.6


def test_a_target_that_is_no_class_makes_the_loss_of_a_gpu_nan():
    """There is no Error, for which a step would have to wait; strict arrays stand for CuPy's"""
    for target in (5, -2, 2**40):
        logits, targets = strict.array(np.zeros((2, 5))), strict.array(np.array([0, target]))
        loss, _ = nn.softmax_cross_entropy_forward(logits, targets)
        assert np.isnan(backend.item(loss))
    loss, _ = nn.softmax_cross_entropy_forward(logits, strict.array(np.array([0, -1])))
    assert abs(backend.item(loss) - np.log(5)) < 1e-15


def test_cross_entropy_of_half_precision(plain):
    rng = np.random.default_rng(0)
    logits, targets = rng.standard_normal((9, 7)).astype("float16"), rng.integers(-1, 7, 9)
    exact = cross_entropy(logits.astype("float64"), targets)
    for run in (lambda f, *args: f(*args), plain):
        loss, gradient, correct = run(cross_entropy, logits, targets)
        assert loss.dtype == gradient.dtype == np.float16 and (correct == exact[2]).all()
        assert abs(loss - exact[0]) < 4e-3 and np.abs(gradient - exact[1]).max() < 2e-4


def test_a_large_vocabulary_takes_one_array_of_logits(plain):
    rng = np.random.default_rng(0)
    h = rng.standard_normal((2048, 32)).astype("float32")
    W = rng.standard_normal((10_000, 32)).astype("float32")
    targets = rng.integers(-1, 10_000, 2048)

    def step():
        logits, cache = nn.linear_forward(h, W)
        loss, loss_cache = nn.softmax_cross_entropy_forward(logits, targets, consume_logits=True)
        nn.linear_backward(nn.softmax_cross_entropy_backward(1.0, loss_cache), cache)
        assert loss.dtype == "float32"

    step()  # what compiling takes does not count
    for run in (lambda f: f(), plain):
        tracemalloc.start()
        run(step)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert 4 * 2048 * 10_000 <= peak < 1.25 * 4 * 2048 * 10_000


def test_the_gradient_of_a_large_embedding(plain):
    rng = np.random.default_rng(0)
    dy = rng.standard_normal((3, 500, 8)).astype("float32")
    tokens = rng.zipf(1.3, (3, 500)) % 33_278
    expected = np.zeros((33_278, 8))
    np.add.at(expected, tokens, dy)
    for run in (lambda f, *args: f(*args), plain):
        run(nn.embedding_backward, dy, (tokens, (33_278, 8)))
        tracemalloc.start()
        found = run(nn.embedding_backward, dy, (tokens, (33_278, 8)))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert found.dtype == "float32" and error(found, expected) < 1e-5 and peak < 1 << 25


def test_a_sum_over_a_large_vocabulary_keeps_float32():
    """Terms of one size, whose sum in float32 would lose three digits"""
    V = 267_735
    logits = np.full((1, V), 0.1, "float32")
    logits[0, ::2] = -0.7
    loss, gradient, _ = cross_entropy(logits, np.array([0]))
    exact, expected, _ = cross_entropy_by_its_sums(logits, np.array([0]))
    assert abs(loss / exact - 1) < 1e-7
    assert np.abs(gradient / expected - 1).max() < 3e-7


def test_batch_norm_running_statistics():
    rng = np.random.default_rng(0)
    x = 3 + 2 * rng.standard_normal((4, 50, 3))
    params = block.norm_init("batch", 3, np, "float64")
    for _ in range(200):
        _, cache = block.norm_forward(params, x, "batch", True)
        params |= block.norm_running(params, cache)
    assert error(params["norm_mean"], x.reshape(-1, 3).mean(axis=0)) < 1e-8
    assert error(params["norm_var"], x.reshape(-1, 3).var(axis=0, ddof=1)) < 1e-8
    y, _ = block.norm_forward(params, x, "batch", False)
    assert abs(y.mean()) < 1e-8 and abs(y.std() - 1) < 0.01


def test_batch_norm_of_one_row_and_of_a_large_mean():
    one = np.ones((1, 1, 2), "float32")
    params = block.norm_init("batch", 2, np, "float32")
    y, cache = block.norm_forward(params, one, "batch", True)
    assert not y.any()
    assert all(np.isfinite(v).all() for v in block.norm_running(params, cache).values())
    x = (1e3 + np.random.default_rng(0).standard_normal((8, 1000, 2))).astype("float32")
    y, _ = block.norm_forward(params, x, "batch", True)
    exact = x.astype("float64")
    exact = (exact - exact.mean(axis=(0, 1))) / exact.std(axis=(0, 1))
    assert error(y, exact) < 2e-4  # x itself carries 6e-5 of its deviation


def test_dropout_keeps_the_mean_and_is_its_seed():
    x = np.ones((4, 1000, 20), "float32")
    y, _ = nn.dropout_forward(x, 0.25, np.random.default_rng(0))
    again, _ = nn.dropout_forward(x, 0.25, np.random.default_rng(0))
    assert (y == again).all() and set(np.unique(y)) == {0, np.float32(1 / 0.75)}
    assert abs(y.mean() - 1) < 0.01
    for p, rng in ((0.25, None), (0, np.random.default_rng(0))):
        assert nn.dropout_forward(x, p, rng)[0] is x


def test_layers_agree_with_pytorch():
    torch = pytest.importorskip("torch", reason="torch is not installed: no comparison with it")
    F, rng = torch.nn.functional, np.random.default_rng(0)
    x, g, b = rng.standard_normal((3, 11, 6)), rng.standard_normal(6), rng.standard_normal(6)
    w = rng.standard_normal((6, 1, 4))
    logits, targets = rng.standard_normal((8, 9)), np.array([0, -1, 3, 8, 2, -1, 1, 1])

    def tensors(*arrays):
        return [torch.tensor(a, requires_grad=a.dtype.kind == "f") for a in arrays]

    def causal(x, w, b):
        return F.conv1d(F.pad(x.mT, (3, 0)), w, b, groups=6).mT

    def batch_norm(x, g, b):
        return F.batch_norm(x.mT, None, None, g, b, training=True).mT

    def ours_batch_norm(x, g, b):
        return nn.batch_norm_forward(x, g, b, None, None, True)

    for ours, backward, theirs, arrays in (
        (
            nn.layer_norm_forward,
            nn.layer_norm_backward,
            lambda *a: F.layer_norm(a[0], (6,), *a[1:]),
            (x, g, b),
        ),
        (
            nn.rms_norm_forward,
            nn.rms_norm_backward,
            lambda x, g: F.rms_norm(x, (6,), g, 1e-5),
            (x, g),
        ),
        (ours_batch_norm, nn.batch_norm_backward, batch_norm, (x, g, b)),
        (nn.gelu_forward, nn.gelu_backward, F.gelu, (x,)),
        (
            nn.gelu_tanh_forward,
            nn.gelu_tanh_backward,
            lambda x: F.gelu(x, approximate="tanh"),
            (x,),
        ),
        (nn.silu_forward, nn.silu_backward, F.silu, (x,)),
        (nn.softplus_forward, nn.softplus_backward, F.softplus, (x,)),
        (nn.glu_forward, nn.glu_backward, F.glu, (x,)),
        (nn.short_conv_forward, nn.short_conv_backward, causal, (x, w, b)),
        (
            lambda x: nn.softmax_cross_entropy_forward(x, targets),
            nn.softmax_cross_entropy_backward,
            lambda x: F.cross_entropy(x, torch.tensor(targets), ignore_index=-1),
            (logits,),
        ),
    ):
        y, cache = ours(*arrays)
        inputs = tensors(*arrays)
        expected = theirs(*inputs)
        assert error(y, expected.detach().numpy()) < 1e-12
        dy = np.asarray(rng.standard_normal(np.shape(y)))
        expected.backward(torch.tensor(dy))
        grads = backward(dy, cache)
        grads = grads if isinstance(grads, tuple) else (grads,)
        for grad, tensor in zip(grads, inputs, strict=False):
            assert error(grad, tensor.grad.numpy()) < 1e-12


def test_recurrent_cells_agree_with_pytorch():
    torch = pytest.importorskip("torch", reason="torch is not installed: no comparison with it")
    rng = np.random.default_rng(0)

    def module(kind, gates, I=3, H=4):
        """A PyTorch cell with our random W, U, b, c"""
        weights = [rng.standard_normal(s) for s in ((gates * H, I), (gates * H, H))]
        weights += [rng.standard_normal(gates * H) for _ in "bc"]
        built = kind(I, H, **({"batch_first": True} if kind is torch.nn.GRU else {})).double()
        for p, w in zip(built.parameters(), weights, strict=True):
            p.data = torch.tensor(w)
        return built, weights

    def compare(grads, tensors):
        for grad, tensor in zip(grads, tensors, strict=True):
            assert error(grad, tensor.grad.numpy()) < 1e-13

    for L, last in ((1, False), (2, True), (3, False), (7, True)):
        gru, weights = module(torch.nn.GRU, 3)
        x, h0 = rng.standard_normal((5, L, 3)), rng.standard_normal((5, 4))
        inputs = [torch.tensor(a, requires_grad=True) for a in (x, h0)]
        expected, final = gru(inputs[0], inputs[1][None])
        expected = final[0] if last else expected
        y, cache = nn.gru_forward(x, *weights, h0, last)
        assert error(y, expected.detach().numpy()) < 1e-14
        dy = rng.standard_normal(y.shape)
        expected.backward(torch.tensor(dy))
        compare(nn.gru_backward(dy, cache), [inputs[0], *gru.parameters(), inputs[1]])
    cell, weights = module(torch.nn.LSTMCell, 4)
    x, state = rng.standard_normal((5, 3)), rng.standard_normal((2, 5, 4))
    inputs = [torch.tensor(a, requires_grad=True) for a in (x, state)]
    expected = torch.stack(cell(inputs[0], (inputs[1][0], inputs[1][1])))
    y, cache = nn.lstm_cell_forward(x, state, *weights)
    assert error(y, expected.detach().numpy()) < 1e-14
    dy = rng.standard_normal(y.shape)
    expected.backward(torch.tensor(dy))
    compare(nn.lstm_cell_backward(dy, cache), [*inputs, *cell.parameters()])


def test_huber_agrees_with_pytorch():
    torch = pytest.importorskip("torch", reason="torch is not installed: no comparison with it")
    rng = np.random.default_rng(0)
    arrays = [3 * rng.standard_normal((5, 4)), rng.standard_normal((5, 4))]
    arrays[0][0], arrays[1][0] = [0.5, -0.5, 0.2, 9], 0  # at the threshold itself, and beyond
    for delta in (0.5, 1.0, 30.0):
        tensors = [torch.tensor(a, requires_grad=True) for a in arrays]
        expected = torch.nn.functional.huber_loss(*tensors, delta=delta)
        loss, cache = nn.huber_forward(*arrays, delta)
        assert error(loss, expected.item()) < 1e-14
        (1.7 * expected).backward()
        for grad, tensor in zip(nn.huber_backward(1.7, cache), tensors, strict=True):
            assert error(grad, tensor.grad.numpy()) < 1e-14


def test_a_gru_goes_on_from_its_state():
    rng = np.random.default_rng(0)
    weights = [rng.standard_normal(s) for s in ((12, 3), (12, 4), (12,), (12,))]
    x = rng.standard_normal((2, 11, 3))
    y, _ = nn.gru_forward(x, *weights)
    start, _ = nn.gru_forward(x[:, :4], *weights, last=True)
    assert error(nn.gru_forward(x[:, 4:], *weights, start)[0], y[:, 4:]) < 1e-15
    assert (y[:, 3] == start).all()
    assert (nn.gru_forward(x, *weights, np.zeros((2, 4)))[0] == y).all()


def test_long_sums_do_not_lose_float32():
    rng = np.random.default_rng(0)
    dy = (1 + rng.random((8, 4096, 3))).astype("float32")
    _, cache = nn.linear_forward(dy, np.eye(3, dtype="float32"), np.zeros(3, "float32"))
    db = nn.linear_backward(dy, cache)[2]
    assert error(db, dy.astype("float64").sum(axis=(0, 1))) < 1e-6


def test_recycled_memory_is_not_shared():
    """A block goes back to the pool only when the last view of it is gone"""
    empty = backend.empty.__wrapped__ if hasattr(backend.empty, "__wrapped__") else backend.empty
    a = empty((300, 300), "float64")
    a[:] = 1
    view = a[10:]
    address = a.ctypes.data
    del a
    b = empty((300, 300), "float64")
    b[:] = 2
    assert (view == 1).all()
    del view
    c = empty((300, 300), "float64")
    assert c.ctypes.data == address
    assert empty((0, 5), "float32").shape == (0, 5) and empty((), "float32").shape == ()
