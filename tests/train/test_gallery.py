"""What is drawn at the end of a run: walks that begin and end where they should, and the nearest of the pairs."""

import json
import types

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from d2g_jax import records
from d2g_jax.train import gallery
from d2g_jax.train.painter import Mix, Pictures, lerp, slerp

SHAPE = (4, 8, 8)


class Pairs:
    """Pairs in memory, as `PairSource` gives them; record i's latent is `latents[i]`."""

    def __init__(self, latents, prompts):
        self.latents, self.prompts = latents, prompts
        self.manifest, self.folder = types.SimpleNamespace(text_shapes={}), "pairs"

    def __len__(self):
        return len(self.latents)

    def __getitem__(self, i):
        return {
            "id": np.int64(i),
            "prompt": np.array(self.prompts[i]),
            "input_ids": np.full(3, i, np.int32),
            "latents": self.latents[i],
        }


class Painter:
    """Stands for the compiled program: the student's latent is the mix of its records' own; notes what it drew."""

    def __init__(self, count):
        self.count, self.calls = count, []

    def pictures(self, params, batch, mix):
        assert len(batch) <= self.count
        assert len(mix.left) <= self.count
        assert all(set(record) == {"id", "input_ids", "latents"} for record in batch)
        own = np.stack([record["latents"] for record in batch])
        share = mix.text[:, None, None, None]
        latents = (1 - share) * own[mix.left] + share * own[mix.right]
        self.calls.append((batch, mix))
        return Pictures(latents, self._image(latents), self._image(own))

    distance_name = "difference"

    def distances(self, a, b):
        return np.abs(a - b).mean((1, 2, 3))

    def _image(self, latents):
        return np.broadcast_to(np.clip(latents[:, 0, :, :, None], 0, 255).astype(np.uint8), (*latents[:, 0].shape, 3))


@pytest.fixture
def noise():
    return np.random.default_rng(0).standard_normal((2, 5, 8, 8, 4)).astype(np.float32)


def test_slerp_keeps_the_norm_and_ends_exactly(noise):
    a, b = jnp.asarray(noise)
    np.testing.assert_array_equal(slerp(a, b, jnp.zeros(5)), a)
    np.testing.assert_array_equal(slerp(a, b, jnp.ones(5)), b)
    a, b = a / jnp.linalg.norm(a), b / jnp.linalg.norm(b)
    a, b = (x / jnp.sqrt(jnp.sum(x * x, (1, 2, 3), keepdims=True)) for x in (a, b))
    middle = slerp(a, b, jnp.full(5, 0.3))
    np.testing.assert_allclose(jnp.sqrt(jnp.sum(middle * middle, (1, 2, 3))), 1.0, rtol=1e-5)
    angle = lambda x, y: np.arccos(np.sum(np.asarray(x) * np.asarray(y), (1, 2, 3)))  # noqa: E731
    np.testing.assert_allclose(angle(a, middle), 0.3 * angle(a, b), rtol=1e-4)
    assert float(jnp.sqrt(jnp.sum(lerp(a, b, jnp.full(5, 0.5)) ** 2)) / np.sqrt(5)) < 0.8  # what the arc is for


def test_slerp_of_equal_noise_is_that_noise(noise):
    a = jnp.asarray(noise[0])
    np.testing.assert_allclose(slerp(a, a, jnp.full(5, 0.4)), a, rtol=1e-6)


def test_each_picture_has_its_own_share():
    a, b = jnp.zeros((3, 2)), jnp.ones((3, 2))
    np.testing.assert_allclose(lerp(a, b, jnp.array([0.0, 0.25, 1.0]))[:, 0], [0.0, 0.25, 1.0])


def test_no_mix_is_every_record_for_itself():
    mix = Mix.none(3)
    assert (mix.left.tolist(), mix.right.tolist(), mix.noise.tolist()) == ([0, 1, 2], [0, 1, 2], [0.0, 0.0, 0.0])


def test_the_nearest_pairs_are_those_of_brute_force(monkeypatch):
    rng = np.random.default_rng(0)
    bank, queries = rng.standard_normal((50, *SHAPE)).astype(np.float16), rng.standard_normal((4, *SHAPE))
    queries[1] = bank[17].astype(np.float64) + 0.01
    monkeypatch.setattr(gallery, "_CHUNK", 7)
    found = gallery.search(queries, Pairs(bank, [""] * 50), 3)
    distances = np.sqrt(((queries[:, None] - bank[None].astype(np.float64)) ** 2).mean((2, 3, 4)))
    np.testing.assert_array_equal(found.ids, np.argsort(distances, 1)[:, :3])
    np.testing.assert_allclose(found.distances, np.sort(distances, 1)[:, :3], rtol=1e-6)
    assert found.ids[1, 0] == 17
    assert found.distances[1, 0] == pytest.approx(0.01, rel=1e-2)
    others = gallery.search(bank[:2].astype(np.float64), Pairs(bank, [""] * 50), 1, skip=[0, -1])
    assert others.ids[0, 0] != 0
    assert others.distances[0, 0] > 0.5
    assert (others.ids[1, 0], others.distances[1, 0]) == (1, 0.0)


def test_a_large_set_is_searched_in_part(monkeypatch):
    monkeypatch.setattr(gallery, "SEARCHED", 5)
    bank = np.arange(101, dtype=np.float32)[:, None, None, None] * np.ones((1, 1, 2, 2), np.float32)
    found = gallery.search(np.full((1, 1, 2, 2), 40.0), Pairs(bank, [""] * 101), 5)
    assert sorted(found.ids[0].tolist()) == [0, 25, 50, 75, 100]
    assert found.ids[0, 0] == 50


def test_the_walk_goes_to_the_prompt_with_the_fewest_words_in_common():
    prompts = ["a bold three", "a bold seven", "the thin 4", "upright zero", "a bold three"]
    assert gallery.distant_prompts(prompts) == (0, 2)


def test_pairs_that_were_not_trained_on_are_not_looked_for():
    bank = np.arange(20, dtype=np.float32)[:, None, None, None] * np.ones((1, 1, 2, 2), np.float32)
    source = records.Rest(Pairs(bank, [""] * 20), [5, 15])
    found, _ = gallery.nearest(np.full((1, 1, 2, 2), 5.1), source)
    assert len(source) == 18
    assert found.ids[0].tolist() == [6, 4, 7]


@pytest.mark.parametrize(("count", "pairs"), [(32, 40), (2, 2), (3, 3)])
def test_a_gallery_says_what_it_shows(tmp_path, monkeypatch, count, pairs):
    latents = np.stack([np.full(SHAPE, 5.0 * i, np.float16) for i in range(pairs)])
    source = Pairs(latents, [f"prompt {i}" for i in range(pairs)])
    monkeypatch.setattr(gallery, "_with_prompts", lambda source: source)
    painter = Painter(count)
    file = gallery.make_gallery(painter, None, source, tmp_path, 320)
    data = json.loads(file.read_text())
    drawn = {int(record["id"]) for batch, _ in painter.calls[:-1] for record in batch}
    assert {i for i in drawn if i >= pairs} >= {pairs, pairs + 1}  # held-out noise
    prompts, noise = data["walks"]
    assert (prompts["of"], prompts["prompts"]) == ("prompts", ["prompt 0", "prompt 1"])
    assert (noise["of"], noise["prompts"]) == ("noise", ["prompt 0"])
    assert [len(walk["images"]) for walk in data["walks"]] == [8, 8]
    shares = np.concatenate([mix.text for _, mix in painter.calls])[:8]
    np.testing.assert_allclose(shares, np.arange(8) / 7)
    arcs = np.concatenate([mix.noise for _, mix in painter.calls])[8:16]
    np.testing.assert_allclose(arcs, np.arange(8) / 7)
    rows = data["nearest"]["rows"]
    assert len(rows) == min(8, pairs)
    assert (data["nearest"]["pairs"], data["nearest"]["searched"]) == (pairs, pairs)
    assert data["nearest"]["between_pairs"] == pytest.approx(5.0)
    for i, row in enumerate(rows):  # this student draws its record's own latent
        assert (row["neighbours"][0]["id"], row["neighbours"][0]["distance"]) == (i, 0.0)
        assert row["neighbours"][0]["prompt"] == row["prompt"] == f"prompt {i}"
    named = [row["image"] for row in rows] + [near["image"] for row in rows for near in row["neighbours"]]
    assert all((tmp_path / name).is_file() for name in named + prompts["images"] + noise["images"])


def test_the_farthest_and_the_nearest_of_teacher_and_student_are_shown(tmp_path, monkeypatch):
    latents = np.stack([np.full(SHAPE, float(i), np.float16) for i in range(30)])
    source, kept = Pairs(latents, [f"prompt {i}" for i in range(30)]), list(range(0, 30, 2))
    monkeypatch.setattr(gallery, "_with_prompts", lambda source: source)
    off = {i: abs(i - 13) for i in kept}  # by how much this student misses: farthest at the ends

    class Wrong(Painter):
        def pictures(self, params, batch, mix):
            drawn = super().pictures(params, batch, mix)
            by = np.array([off.get(int(record["id"]), 0.0) for record in batch])[mix.left]
            return drawn._replace(latents=drawn.latents + by[:, None, None, None])

    said = json.loads(gallery.make_gallery(Wrong(32), None, source, tmp_path, 320, kept).read_text())["teacher"]
    assert (said["by"], said["pairs"], said["mean"]) == (
        "difference",
        15,
        pytest.approx(np.mean(list(off.values())), abs=1e-3),
    )
    assert [row["distance"] for row in said["rows"]] == [15.0, 13.0, 13.0, 11.0, 3.0, 3.0, 1.0, 1.0]
    assert [row["prompt"] for row in said["rows"]][:2] == ["prompt 28", "prompt 0"]
    for row in said["rows"]:
        own = int(row["prompt"].split()[1])
        assert (np.asarray(Image.open(tmp_path / row["teacher"]))[..., 0] == own).all()


def test_few_pairs_are_shown_once_each(tmp_path, monkeypatch):
    source = Pairs(np.zeros((8, *SHAPE), np.float16), ["a"] * 8)
    monkeypatch.setattr(gallery, "_with_prompts", lambda source: source)
    said = json.loads(gallery.make_gallery(Painter(8), None, source, tmp_path, 320, [1, 2, 3, 4, 5]).read_text())
    assert len(said["teacher"]["rows"]) == 5
    said = json.loads(gallery.make_gallery(Painter(8), None, source, tmp_path, 320).read_text())
    assert said["teacher"] is None


def test_one_pair_makes_no_gallery(tmp_path):
    assert gallery.make_gallery(Painter(1), None, Pairs(np.zeros((1, *SHAPE)), ["a"]), tmp_path, 8) is None
    assert list(tmp_path.iterdir()) == []
