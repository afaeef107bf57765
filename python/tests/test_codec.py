"""The codec against plain numpy in float64."""

import copy
import multiprocessing

import numpy as np
import pytest
from conftest import TINY, TRAINING, drawn, identity

import lexico


def attention(queries, keys, values, window=None):
    """Causal attention in float64: queries `[heads, t, m]`, keys and values `[kv_heads, n, m]`, the last `t` their own."""
    queries, keys, values = (np.asarray(x, np.float64) for x in (queries, keys, values))
    heads, t, m = queries.shape
    kv_heads, n, _ = keys.shape
    out = np.zeros_like(queries)
    for head in range(heads):
        own = head // (heads // kv_heads)
        for i in range(t):
            last = n - t + i + 1
            first = 0 if window is None else max(last - window, 0)
            scores = keys[own, first:last] @ queries[head, i] / np.sqrt(m)
            weights = np.exp(scores - scores.max())
            out[head, i] = weights @ values[own, first:last] / weights.sum()
    return out


def attended(rng, cache, heads, t, window=None):
    """Drawn queries, keys and values of `t` new positions, and what a cache attends to with them, which is checked."""
    keys, values = rng.standard_normal((2, 2, t, 16)).astype(np.float32)
    queries = rng.standard_normal((heads, t, 16)).astype(np.float32)
    held_keys, held_values = cache.decode()
    out = cache.attend(queries, keys, values)
    expected = attention(
        queries, np.concatenate([held_keys, keys], 1), np.concatenate([held_values, values], 1), window
    )
    np.testing.assert_allclose(out, expected, atol=2e-3)
    return queries, keys, values, out


@pytest.mark.parametrize("m", [8, 33])
def test_sparse_codes_decode_to_their_sums(m):
    rng = np.random.default_rng(m)
    atoms = rng.standard_normal((5 * m, m))
    atoms /= np.linalg.norm(atoms, axis=1, keepdims=True)
    vectors = rng.standard_normal((40, m))
    codes = lexico.Dictionary(atoms).encode(vectors, 6, coefficients="f32")
    assert (len(codes), codes.sparsity, codes.nbytes) == (40, 6, 40 * 36)
    used = np.arange(6) < codes.lengths[:, None]
    expected = np.einsum("ns,nsm->nm", codes.coefficients * used, atoms[codes.indices])
    np.testing.assert_allclose(codes.decode(), expected, atol=1e-5)
    rest = np.linalg.norm(vectors - codes.decode(), axis=1) / np.linalg.norm(vectors, axis=1)
    assert (codes.relative_errors <= rest + 1e-5).all() and rest.mean() < 0.8


def test_as_many_atoms_as_numbers_are_exact():
    rng = np.random.default_rng(1)
    atoms = rng.standard_normal((64, 16))
    atoms /= np.linalg.norm(atoms, axis=1, keepdims=True)
    vectors = rng.standard_normal((20, 16)).astype(np.float32)
    codes = lexico.Dictionary(atoms).encode(vectors, 16, coefficients="f32")
    np.testing.assert_allclose(codes.decode(), vectors, atol=1e-4)


def test_additive_codes_decode_to_their_sums():
    rng = np.random.default_rng(2)
    atoms = rng.standard_normal((32 + 3 * 256, 12))
    codes = lexico.Codebooks(atoms, first=32).encode(rng.standard_normal((50, 12)), 4)
    assert codes.nbytes == 50 * 5
    assert (codes.indices[:, 0] < 32).all() and (codes.indices[:, 3] >= 32 + 512).all()
    # The scale is one of 32 that a code keeps: 2^(k/32).
    scale = 2 ** (np.round(np.log2(codes.coefficients[:, :1]) * 32) / 32)
    expected = scale * atoms[codes.indices].sum(axis=1)
    np.testing.assert_allclose(codes.decode(), expected, rtol=0.03, atol=1e-4)


@pytest.mark.parametrize(
    "options", ["sparsity=4", "format=i8,sparsity=5", "format=f32,sparsity=16", "format=f8,sparsity=3"]
)
@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("maps", [True, False])
def test_attention_is_that_of_what_is_held(options, window, maps):
    rng = np.random.default_rng(3)
    dictionaries = drawn(rng, identity(), maps=maps)
    cache = lexico.LayerCache(dictionaries, 0, f"lexico:{options},window=16,batch=4,dense=f32", sliding_window=window)
    seen = 0
    for t in (70, 1, 1, 5, 1, 1, 1, 1, 1, 30, 1):
        queries, keys, values, out = attended(rng, cache, 6, t, window)
        grouped = cache.attend(queries.reshape(2, 3, t, 16), keys, values)
        assert (grouped.reshape(out.shape) == out).all()
        cache.append(keys, values)
        seen += t
        assert len(cache) == seen if window is None else len(cache) < window + 200
    assert cache.coded > 0
    held_keys, held_values = cache.decode()
    queries = rng.standard_normal((2, 1, 16))
    np.testing.assert_allclose(cache.attend(queries), attention(queries, held_keys, held_values, window), atol=2e-3)


def test_what_is_dense_comes_back_and_what_is_exact_too():
    rng = np.random.default_rng(4)
    dictionaries = drawn(rng, identity())
    keys, values = rng.standard_normal((2, 2, 300, 16)).astype(np.float32)
    for options in ("lexico:window=400,dense=f32", "lexico:window=8,batch=4,dense=f32,format=f32,sparsity=16"):
        cache = lexico.LayerCache(dictionaries, 0, options)
        cache.append(keys, values)
        for held, given in zip(cache.decode(), (keys, values), strict=True):
            np.testing.assert_allclose(held, given, atol=2e-3)


def test_arrays_of_all_kinds_are_taken_alike():
    rng = np.random.default_rng(5)
    dictionaries = drawn(rng, identity())
    keys = rng.standard_normal((2, 40, 16)).astype(np.float32)
    caches = lexico.LayerCache.for_layers(dictionaries, "lexico:window=8,batch=4,sparsity=4")
    for form in (
        keys,
        keys.astype(np.float64),
        np.asfortranarray(keys),
        keys.tolist(),
        np.repeat(keys, 2, 2)[:, :, ::2],
    ):
        cache = caches[0].fork()
        cache.append(form, form)
        other = caches[0].fork()
        other.append(keys, keys)
        assert cache.save() == other.save()


def test_a_saved_layer_goes_on_as_it_was():
    rng = np.random.default_rng(6)
    dictionaries = drawn(rng, identity())
    options = "lexico:window=16,batch=4,sparsity=5"
    cache = lexico.LayerCache(dictionaries, 0, options)

    def draw(t):
        return rng.standard_normal((2, 2, t, 16)).astype(np.float32)

    cache.append(*draw(100))
    for _ in range(5):
        cache.append(*draw(1))
    saved = cache.save()
    again = lexico.LayerCache(dictionaries, 0, options)
    again.load(saved)
    copies = [again, cache.fork(), copy.deepcopy(cache)]
    for _ in range(30):
        new = draw(1)
        for own in (cache, *copies):
            own.append(*new)
    for own in copies:
        assert own.coded == cache.coded
        for part, expected in zip(own.decode(), cache.decode(), strict=True):
            assert (part == expected).all()
    for place in range(0, len(saved), 97):
        damaged = bytearray(saved)
        damaged[place] ^= 0x10
        with pytest.raises(lexico.LexicoError):
            again.load(bytes(damaged))
        with pytest.raises(lexico.LexicoError):
            again.load(saved[:place])
    assert (again.decode()[0] == cache.decode()[0]).all()
    other = lexico.LayerCache(dictionaries, 0, "lexico:window=20,batch=4,sparsity=5")
    with pytest.raises(lexico.LexicoError, match="other settings"):
        other.load(saved)
    foreign = lexico.LayerCache(drawn(rng, identity()), 0, options)
    with pytest.raises(lexico.LexicoError, match="dictionary"):
        foreign.load(saved)


def test_settings_are_the_same_however_they_are_told():
    rng = np.random.default_rng(6)
    dictionaries = drawn(rng, identity())
    told = lexico.LayerCache(dictionaries, 0, "lexico:window=128,sinks=4,batch=16,fit=unbiased,dense=f16")
    told.append(*rng.standard_normal((2, 2, 200, 16)).astype(np.float32))
    usual = lexico.LayerCache(dictionaries, 0)
    usual.load(told.save())
    assert (usual.decode()[0] == told.decode()[0]).all()


def test_what_is_wrong_with_options_is_told_in_few_words():
    dictionaries = drawn(np.random.default_rng(6), identity())
    for options, words in (
        ("kivi", "no cache method"),
        ("lexico:widht=3", "widht: there is no such option; there are: sparsity"),
        ("lexico:window=8,window=9", "window is given twice"),
        ("lexico:window=wide", "window=wide: .*whole number"),
        ("lexico:fit=" + "\x1b[2J" * 10000, "fit="),
        ("lexico:" + "x" * 10000, "no such option"),
    ):
        with pytest.raises(ValueError, match=words) as refused:
            lexico.LayerCache(dictionaries, 0, options)
        assert len(str(refused.value)) < 1000 and "\x1b" not in str(refused.value)


def test_positions_can_begin_anywhere():
    rng = np.random.default_rng(7)
    dictionaries = drawn(rng, identity())
    options = "lexico:window=0,batch=1,sinks=0,sparsity=6"
    maps, codebooks = dictionaries.maps(0, "keys"), dictionaries.codebooks(0, "keys")
    keys = rng.standard_normal((2, 30, 16)).astype(np.float32)
    cache = lexico.LayerCache(dictionaries, 0, options, first_position=500)
    cache.append(keys, keys)
    positions = np.arange(500, 530)
    for head in range(2):
        codes = codebooks.encode(maps.apply(head, positions, keys[head]), 6)
        expected = maps.invert(head, positions, codes.decode())
        np.testing.assert_allclose(cache.decode()[0][head], expected, atol=1e-4)


def test_dropping_and_bytes(tiny):
    cache = lexico.LayerCache(tiny, 0, "lexico:sparsity=8")
    rng = np.random.default_rng(8)
    keys, values = rng.standard_normal((2, 2, 1000, 64)).astype(np.float32)
    cache.append(keys, values)
    assert sum(cache.footprint().values()) == cache.nbytes < 0.35 * 4 * 2 * 1000 * 64
    cache.drop(900)
    assert len(cache) == 100
    with pytest.raises(ValueError, match="101"):
        cache.drop(101)


def test_files_come_back(tiny, tmp_path):
    path = tmp_path / "copy.safetensors"
    tiny.save(path)
    again = lexico.Dictionaries.load(path)
    assert again.model == tiny.model and again.training == tiny.training and len(again) == 4
    for part in ("keys", "values"):
        assert (again.codebooks(3, part).atoms == tiny.codebooks(3, part).atoms).all()
        assert (again.dictionary(3, part).atoms == tiny.dictionary(3, part).atoms).all()
    made = drawn(np.random.default_rng(9), identity(layers=3))
    made.save(path)
    again = lexico.Dictionaries.load(path)
    maps, other = made.maps(2, "keys"), again.maps(2, "keys")
    assert (maps.matrices == other.matrices).all() and (maps.rotary_means == other.rotary_means).all()


def test_codebooks_are_learned_and_learning_breaks_off():
    rng = np.random.default_rng(10)
    vectors = rng.standard_normal((4000, 8)).astype(np.float32)
    seen = []

    def learn(progress):
        options = {"codebooks": 3, "first": 64, "sparsity": 3, "rounds": 2}
        return lexico.learn_codebooks(vectors[500:], vectors[:500], **options, progress=progress)

    codebooks, error = learn(lambda step, steps: seen.append((step, steps)))
    assert len(codebooks) == 3 and 0.05 < error < 0.6
    assert seen[-1][0] == seen[-1][1] and len(seen) > 3
    codes = codebooks.encode(vectors[:500], 3)
    assert abs(codes.relative_errors.mean() - error) < 1e-3
    assert (learn(None)[0].atoms == codebooks.atoms).all()

    def stop(step, steps):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learn(stop)
    dictionary, error = lexico.learn_dictionary(vectors[500:], vectors[:500], atoms=128, sparsity=3, epochs=2)
    assert len(dictionary) == 128 and 0 < error < 0.7


def test_maps_are_of_the_moments():
    rng = np.random.default_rng(11)
    vectors = rng.standard_normal((2, 100, 6)).astype(np.float32) + 3
    roots = rng.standard_normal((2, 6, 6))
    moments = roots @ roots.transpose(0, 2, 1)
    maps = lexico.head_maps(vectors, moments)
    np.testing.assert_allclose(maps.means, vectors.mean(axis=1), atol=1e-4)
    scale = np.trace(moments, axis1=1, axis2=2).mean() / 6
    np.testing.assert_allclose(maps.matrices @ maps.matrices, moments / scale, atol=0.02)
    np.testing.assert_allclose(maps.inverses @ maps.matrices, np.eye(6)[None].repeat(2, 0), atol=1e-3)
    positions = np.arange(100)
    there = maps.apply(1, positions, vectors[1])
    np.testing.assert_allclose(maps.invert(1, positions, there), vectors[1], atol=1e-3)


def test_heads_are_coded_together():
    rng = np.random.default_rng(12)
    positions = np.arange(500)
    # Both heads are nearly the same.
    vectors = np.repeat(rng.standard_normal((1, 500, 16)), 2, axis=0) + 0.1 * rng.standard_normal((2, 500, 16))
    moments = np.stack([np.eye(16)] * 2)
    rotary = {"frequencies": [1.0, 0.01], "positions": positions}
    for given in ({}, rotary):
        alone = lexico.head_maps(vectors, moments, **given)
        maps = lexico.head_maps(vectors, moments, joint_heads=2, **given)
        assert (alone.joint_heads, maps.joint_heads) == (1, 2)
        assert alone.basis is None and maps.basis.shape == (1, 32, 32)
        np.testing.assert_allclose(maps.basis[0] @ maps.basis[0].T, np.eye(32), atol=1e-4)
        parts = maps.apply_all(positions, vectors)
        np.testing.assert_allclose(maps.invert_all(positions, parts), vectors, atol=1e-3)
        # What they have in common is in the first half of each part.
        assert (parts[:, :, :8] ** 2).sum() > 0.95 * (parts**2).sum()
        separate = np.stack([alone.apply(head, positions, vectors[head]) for head in range(2)])
        np.testing.assert_allclose(alone.apply_all(positions, vectors), separate, atol=1e-5)
        turned = maps.basis[0] @ separate.transpose(1, 0, 2).reshape(500, 32).T
        np.testing.assert_allclose(parts.transpose(1, 0, 2).reshape(500, 32), turned.T, atol=1e-3)
        with pytest.raises(ValueError, match="2 heads are coded together"):
            maps.apply(0, positions, vectors[0])
    atoms = rng.standard_normal((64 + 7 * 256, 16)) * np.repeat(0.7 ** np.arange(8), [64] + [256] * 7)[:, None]
    codebooks = (lexico.Codebooks(atoms, first=64),) * 2
    dictionaries = lexico.Dictionaries(
        identity(), TRAINING, [{"codebooks": codebooks, "maps": (maps, maps_of_values(rng))}]
    )
    cache = lexico.LayerCache(dictionaries, 0, "lexico:window=16,batch=4,sparsity=6,dense=f32")
    for t in (60, 1, 1, 5, 1, 1):
        _, keys, values, _ = attended(rng, cache, 4, t)
        cache.append(keys, values)
    assert cache.coded > 0


def maps_of_values(rng):
    basis = np.linalg.qr(rng.standard_normal((32, 32)))[0]
    return lexico.HeadMaps(np.zeros((2, 16)), np.stack([np.eye(16)] * 2), basis=basis[None])


def test_moments_are_read_however_they_lie():
    rng = np.random.default_rng(8)
    vectors = rng.standard_normal((2, 100, 6)).astype(np.float32)
    moments = np.stack([a @ a.T for a in rng.standard_normal((2, 6, 9))])
    expected = lexico.head_maps(vectors, moments).matrices
    for same in (np.asfortranarray(moments), moments.tolist(), np.repeat(moments, 2, axis=2)[..., ::2]):
        np.testing.assert_array_equal(lexico.head_maps(vectors, same).matrices, expected)


def test_arrays_at_odd_addresses_are_copied():
    vectors = np.random.default_rng(9).standard_normal((3, 8)).astype(np.float32)
    odd = np.frombuffer(b"x" + vectors.tobytes(), np.uint8)[1:].view(np.float32).reshape(3, 8)
    assert not odd.flags.aligned
    dictionary = lexico.Dictionary(np.eye(8))
    np.testing.assert_array_equal(dictionary.encode(odd, 8).indices, dictionary.encode(vectors, 8).indices)


def test_a_cache_that_could_not_code_is_not_used_further():
    dictionaries = drawn(np.random.default_rng(10), identity())
    cache = lexico.LayerCache(dictionaries, 0, "lexico:sparsity=2,window=4,sinks=0")
    huge = np.full((2, 40, 16), 3e38, np.float32) * np.random.default_rng(11).choice([-1, 1], (2, 40, 16))
    with pytest.raises((ValueError, lexico.LexicoError)):
        cache.append(huge.astype(np.float32), huge.astype(np.float32))
    for use in (lambda: len(cache), cache.fork, cache.save, lambda: cache.attend(np.zeros((2, 1, 16)))):
        with pytest.raises(lexico.LexicoError, match="broke off"):
            use()


def test_what_is_wrong_is_said(tiny, tmp_path):
    refused = [
        (ValueError, "shape", lambda: lexico.Dictionary(np.ones(3))),
        (ValueError, "length", lambda: lexico.Dictionary(np.ones((3, 4)))),
        (TypeError, "dtype", lambda: lexico.Dictionary(np.array(["a"]))),
        (TypeError, "complex", lambda: lexico.Dictionary(np.ones((3, 4)) * 1j)),
        (ValueError, "codebook", lambda: lexico.Codebooks(np.ones((100, 4)), first=3)),
        (ValueError, "NaN", lambda: lexico.Codebooks(np.full((3, 4), np.nan), first=3)),
        (ValueError, "sparsity 90", lambda: tiny.dictionary(0, "keys").encode(np.ones((2, 64)), 90)),
        (ValueError, "length 63", lambda: tiny.dictionary(0, "keys").encode(np.ones((2, 63)), 4)),
        (ValueError, "NaN", lambda: tiny.dictionary(0, "keys").encode(np.full((2, 64), np.inf), 4)),
        (ValueError, "coefficients", lambda: tiny.dictionary(0, "keys").encode(np.ones((2, 64)), 4, coefficients="i4")),
        (ValueError, "fit", lambda: tiny.codebooks(0, "keys").encode(np.ones((2, 64)), 4, fit="best")),
        (ValueError, "part", lambda: tiny.codebooks(0, "queries")),
        (IndexError, "layer 4", lambda: tiny.codebooks(4, "keys")),
        (IndexError, "layer 9", lambda: lexico.LayerCache(tiny, 9)),
        (ValueError, "sparsty", lambda: lexico.LayerCache(tiny, 0, "lexico:sparsty=3")),
        (ValueError, "kivi", lambda: lexico.LayerCache(tiny, 0, "kivi")),
        (ValueError, "batch", lambda: lexico.LayerCache(tiny, 0, "lexico:batch=0")),
        (ValueError, "1 to 32", lambda: lexico.LayerCache(tiny, 0, "lexico:sparsity=33")),
        (FileNotFoundError, "none", lambda: lexico.Dictionaries.load(tmp_path / "none")),
        (OSError, "folder", lambda: tiny.save(tmp_path / "folder" / "file")),
        (lexico.LexicoError, "head dim", lambda: tiny.check_fits(tiny.model | {"head_dim": 32})),
        (ValueError, "missing field", lambda: tiny.check_fits({"name": "nothing"})),
        (ValueError, "twice", lambda: lexico.LayerCache(tiny, 0, "lexico:window=3,window=4")),
        (ValueError, "format=i8", lambda: lexico.LayerCache(tiny, 0, "lexico:tolerance=0.1")),
        (ValueError, "beam", lambda: lexico.LayerCache(tiny, 0, "lexico:format=i8,beam=4")),
        (ValueError, "additive, i8", lambda: lexico.LayerCache(tiny, 0, "lexico:format=i4")),
        (ValueError, "window=x", lambda: lexico.LayerCache(tiny, 0, "lexico:window=x")),
        (ValueError, "3 layers", lambda: lexico.LayerCache.for_layers(tiny, sliding_windows=[None] * 3)),
        (ValueError, "model of 2", lambda: lexico.Dictionaries(identity(2), TRAINING, [{}])),
        (ValueError, "neither", lambda: lexico.Dictionaries(identity(), TRAINING, [{}])),
        (ValueError, 'no "keys"', lambda: lexico.Dictionaries(identity(), TRAINING, [{"keys": 1}])),
        (ValueError, "0 vectors", lambda: lexico.learn_codebooks(np.ones((0, 4)))),
        (ValueError, "at least 1", lambda: lexico.learn_codebooks(np.ones((9, 4)), rounds=1, beam=0)),
        (
            ValueError,
            "positions",
            lambda: lexico.head_maps(np.ones((1, 3, 2)), np.ones((1, 2, 2)), positions=[1, 2, 3]),
        ),
        (ValueError, "moments", lambda: lexico.head_maps(np.ones((1, 3, 2)), np.ones((1, 3, 2)))),
        (ValueError, "joint_heads=2", lambda: lexico.head_maps(np.ones((3, 3, 2)), np.ones((3, 2, 2)), joint_heads=2)),
        (
            ValueError,
            "orthonormal",
            lambda: lexico.HeadMaps(np.ones((2, 1)), np.ones((2, 1, 1)), basis=np.ones((1, 2, 2))),
        ),
    ]
    for kind, word, call in refused:
        with pytest.raises(kind) as raised:
            call()
        assert word in str(raised.value), (word, raised.value)
    (tmp_path / "damaged").write_bytes((TINY / "dictionary.safetensors").read_bytes()[:5000])
    with pytest.raises(lexico.LexicoError, match="damaged"):
        lexico.Dictionaries.load(tmp_path / "damaged")
    cache = lexico.LayerCache(tiny, 0)
    good = np.ones((2, 3, 64))
    for keys, values, word in [
        (np.ones((1, 3, 64)), good, r"\[2, t, 64\]"),
        (good, np.ones((2, 4, 64)), "4"),
        (np.full((2, 3, 64), np.nan), good, "NaN"),
        (np.ones((2, 64)), good, "shape"),
    ]:
        with pytest.raises(ValueError, match=word):
            cache.append(keys, values)
        with pytest.raises(ValueError, match=word):
            cache.attend(np.ones((4, 3, 64)), keys, values)
    for queries in (np.ones((3, 3, 64)), np.ones((4, 2, 64)), np.ones((4, 3, 63)), np.ones(64)):
        with pytest.raises(ValueError, match="queries"):
            cache.attend(queries, good, good)
    with pytest.raises(ValueError, match="both"):
        cache.attend(np.ones((4, 1, 64)), good)
    assert len(cache) == 0
    assert not cache.attend(np.ones((4, 1, 64))).any()
    assert cache.attend(np.ones((4, 0, 64)), np.ones((2, 0, 64)), np.ones((2, 0, 64))).shape == (4, 0, 64)


def _in_child(queue):
    try:
        tiny = lexico.Dictionaries.load(TINY / "dictionary.safetensors")
        queue.put(str(tiny))
    except lexico.LexicoError as error:
        queue.put(str(error))


def test_a_forked_process_is_told_so(tiny):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=_in_child, args=(queue,))
    process.start()
    assert "spawn" in queue.get(timeout=60)
    process.join()
