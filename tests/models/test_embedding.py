"""The embedding cache: every image once, whatever is added, taken away, damaged, interrupted or done at once."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from torch import Tensor

from clinifed.errors import DataError
from clinifed.models import embedding
from clinifed.models.embedding import SHARD_ROWS, embed_images
from clinifed.models.shards import Shards, row_bytes, wipe

SPACE = {"base": "a" * 64, "cut": True}
WIDTH = 6


def content(number: int) -> str:
    return sha256(str(number).encode()).hexdigest()


def row(image: str | None, view: int) -> Tensor:
    return torch.tensor([float(b) for b in sha256(f"{image}|{view}".encode()).digest()[:WIDTH]])


class Tower:
    """An encoder that notes what it was asked."""

    def __init__(self, images: Sequence[str | None], unreadable: Sequence[int] = (), batch: int = 7) -> None:
        self.images, self.unreadable, self.batch = images, unreadable, batch
        self.asked: list[tuple[int, tuple[int, ...]]] = []

    def __call__(self, numbers: Sequence[int], views: Sequence[int]) -> Iterator[tuple[list[int], Tensor]]:
        for start in range(0, len(numbers), self.batch):
            some = numbers[start : start + self.batch]
            self.asked += [(number, tuple(views)) for number in some]
            read = [number for number in some if number not in self.unreadable]
            if read:
                yield read, torch.stack([torch.stack([row(self.images[n], v) for v in views]) for n in read])


def expected(images: Sequence[str | None], views: int) -> Tensor:
    return torch.stack([row(image, view) for image in images for view in range(views)])


def shard_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def run(images: Sequence[str | None], folder: Path | None, views: int = 1, **tower: object):
    encode = Tower(images, **tower)
    shards = None if folder is None else Shards(folder, SPACE)
    return embed_images(images, views, encode, shards), encode.asked


@pytest.mark.parametrize("views", [1, 3])
def test_what_is_kept_is_what_was_computed_and_nothing_is_computed_again(tmp_path: Path, views: int) -> None:
    images = [content(n) for n in range(20)]
    first, asked = run(images, tmp_path / "cache", views)
    again, nothing = run(images, tmp_path / "cache", views)
    assert len(asked) == 20
    assert nothing == []
    assert torch.equal(first.features, expected(images, views))
    assert torch.equal(again.features, first.features)
    assert (first.found, first.computed, again.found, again.computed) == (0, 20 * views, 20 * views, 0)
    assert first.images == again.images == [n for n in range(20) for _ in range(views)]


def test_an_order_of_its_own_and_images_that_come_and_go_need_only_the_new_ones(tmp_path: Path) -> None:
    run([content(n) for n in range(10)], tmp_path)
    images = [content(n) for n in (12, 3, 11, 9, 0)]
    found, asked = run(images, tmp_path)
    assert sorted(asked) == [(0, (0,)), (2, (0,))]
    assert torch.equal(found.features, expected(images, 1))


def test_more_views_need_only_the_new_views(tmp_path: Path) -> None:
    images = [content(n) for n in range(4)]
    run(images, tmp_path, 1)
    found, asked = run(images, tmp_path, 3)
    assert {views for _, views in asked} == {(1, 2)}
    assert torch.equal(found.features, expected(images, 3))


@pytest.mark.parametrize("change", [{"base": "b" * 64}, {"cut": False}, {"transform": "c"}])
def test_another_model_cut_or_transform_shares_nothing(tmp_path: Path, change: dict[str, object]) -> None:
    images = [content(n) for n in range(4)]
    run(images, tmp_path)
    encode = Tower(images)
    embed_images(images, 1, encode, Shards(tmp_path, {**SPACE, **change}))
    assert len(encode.asked) == 4
    assert run(images, tmp_path)[1] == []


def test_equal_bytes_are_encoded_once(tmp_path: Path) -> None:
    images = [content(0), content(1), content(0), content(0)]
    found, asked = run(images, tmp_path)
    assert [number for number, _ in asked] == [0, 1]
    assert torch.equal(found.features, expected(images, 1))


def test_of_equal_bytes_one_that_cannot_be_read_costs_the_others_nothing(tmp_path: Path) -> None:
    images = [content(0), content(0), content(0)]
    found, asked = run(images, tmp_path, unreadable=[0])
    assert [number for number, _ in asked] == [0, 1]
    assert found.images == [0, 1, 2]


@pytest.mark.parametrize("kept", [True, False])
def test_what_cannot_be_read_is_left_out_and_asked_for_again(tmp_path: Path, kept: bool) -> None:
    images: list[str | None] = [content(0), content(1), None, content(3), None]
    folder = tmp_path if kept else None
    found, _ = run(images, folder, 2, unreadable=[0, 4])
    assert found.images == [1, 1, 2, 2, 3, 3]
    assert torch.equal(found.features, expected([images[n] for n in (1, 2, 3)], 2))
    again, asked = run(images, folder, 2, unreadable=[0, 4])
    assert sorted(number for number, _ in asked) == ([0, 2, 4] if kept else [0, 1, 2, 3, 4])
    assert torch.equal(again.features, found.features)


@pytest.mark.parametrize("views", [1, 2])
def test_frames_of_a_volume_are_kept_together_however_many_it_has(tmp_path: Path, views: int) -> None:
    images, frames, has = [content(n) for n in (0, 1, 2, 0, 3)], [1, 4, 4, 4, 4], [1, 4, 2, 4, 1]

    def encode(numbers: Sequence[int], seen: Sequence[int]) -> Iterator[tuple[list[int], Tensor]]:
        asked.append(list(numbers))
        read = [number for number in numbers for _ in range(has[number])]
        rows = [torch.stack([row(f"{images[n]}/{j}", v) for v in seen]) for n in numbers for j in range(has[n])]
        yield read, torch.stack(rows)

    expected_rows = [row(f"{images[n]}/{j}", v) for n in range(5) for j in range(has[n]) for v in range(views)]
    asked: list[list[int]] = []
    for folder in (None, tmp_path, tmp_path):
        shards = None if folder is None else Shards(folder, SPACE)
        found = embed_images(images, views, encode, shards, frames)
        assert torch.equal(found.features, torch.stack(expected_rows))
        assert found.images == [n for n in range(5) for _ in range(has[n] * views)]
    assert asked == [[0, 1, 2, 3, 4]] * 2  # not a third time; the first image is another with four frames
    assert found.found == len(expected_rows)


def test_nothing_readable_is_no_row(tmp_path: Path) -> None:
    found, _ = run([content(0), None], tmp_path, unreadable=[0, 1])
    assert (found.images, found.features.shape[0]) == ([], 0)


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def flip(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


@pytest.mark.parametrize("damage", [cut, flip, lambda data: b"", lambda data: data + b"\0"])
def test_a_damaged_shard_is_dropped_counted_and_computed_anew(tmp_path: Path, damage, caplog) -> None:
    images = [content(n) for n in range(5)]
    run(images, tmp_path)
    [shard] = shard_files(tmp_path)
    shard.write_bytes(damage(shard.read_bytes()))
    found, asked = run(images, tmp_path)
    assert (found.damaged, found.computed, len(asked)) == (1, 5, 5)
    assert torch.equal(found.features, expected(images, 1))
    assert "1 damaged shards" in caplog.text
    assert run(images, tmp_path)[0].damaged == 0


def test_a_shard_under_another_shards_name_is_damaged(tmp_path: Path) -> None:
    run([content(0)], tmp_path)
    [first] = shard_files(tmp_path)
    kept = first.read_bytes()
    run([content(1)], tmp_path)
    [other] = set(shard_files(tmp_path)) - {first}
    other.write_bytes(kept)
    found, _ = run([content(0), content(1)], tmp_path)
    assert (found.damaged, found.found) == (1, 1)
    assert torch.equal(found.features, expected([content(0), content(1)], 1))


def test_with_another_key_nothing_is_believed(tmp_path: Path) -> None:
    run([content(0)], tmp_path)
    (tmp_path / "cache.key").write_bytes(b"short")
    found, asked = run([content(0)], tmp_path)
    assert len(asked) == 1
    assert torch.equal(found.features, expected([content(0)], 1))


def test_an_interrupted_run_keeps_the_finished_shards(tmp_path: Path) -> None:
    images = [content(n) for n in range(SHARD_ROWS + 40)]
    encode = Tower(images, batch=16)

    def interrupted(numbers: Sequence[int], views: Sequence[int]) -> Iterator[tuple[list[int], Tensor]]:
        for number, batch in enumerate(encode(numbers, views)):
            if 16 * number > SHARD_ROWS + 10:
                raise KeyboardInterrupt
            yield batch

    with pytest.raises(KeyboardInterrupt):
        embed_images(images, 1, interrupted, Shards(tmp_path, SPACE))
    found, asked = run(images, tmp_path)
    assert (found.found, len(asked)) == (SHARD_ROWS, 40)
    assert torch.equal(found.features, expected(images, 1))


def test_the_folder_and_its_files_are_their_owners_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        run([content(0)], tmp_path / "a" / "cache")
    finally:
        os.umask(before)
    folder = tmp_path / "a" / "cache"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}


def test_a_folder_that_others_may_enter_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o755)
    with pytest.raises(DataError, match="chmod 700"):
        Shards(tmp_path / "cache", SPACE)


def test_a_place_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")
    with pytest.raises(DataError, match="cannot be used"):
        Shards(tmp_path / "cache", SPACE)


def test_names_and_bytes_say_neither_which_images_nor_which_model(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        run([content(0), content(1)], tmp_path / folder)
    kept = b"".join(path.name.encode() + path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    for word in (content(0), content(1), "a" * 64):
        assert word.encode() not in kept
        assert bytes.fromhex(word) not in kept
    assert {p.name for p in shard_files(tmp_path / "one")}.isdisjoint(p.name for p in shard_files(tmp_path / "two"))


def test_a_row_takes_what_is_promised(tmp_path: Path) -> None:
    run([content(n) for n in range(200)], tmp_path)
    [shard] = shard_files(tmp_path)
    assert 200 * row_bytes(WIDTH) <= shard.stat().st_size <= 200 * row_bytes(WIDTH) + 256


def test_the_folder_is_bounded_and_what_was_used_last_stays(tmp_path: Path) -> None:
    limit = 3 * (50 * row_bytes(WIDTH) + 256)
    sets = [[content(1000 * which + n) for n in range(50)] for which in range(5)]
    for images in sets:
        embed_images(images, 1, Tower(images), Shards(tmp_path, SPACE, limit))
        time.sleep(0.02)  # file times are coarse
        assert sum(path.stat().st_size for path in shard_files(tmp_path)) <= limit
    kept = [embed_images(images, 1, Tower(images), Shards(tmp_path, SPACE)).found for images in sets]
    assert kept[0] == 0
    assert kept[-1] == 50


def test_where_all_room_is_in_use_nothing_in_use_is_dropped(tmp_path: Path, monkeypatch, caplog) -> None:
    monkeypatch.setattr(embedding, "SHARD_ROWS", 10)
    images = [content(n) for n in range(40)]
    limit = 2 * (10 * row_bytes(WIDTH) + 256)
    embed_images(images, 1, Tower(images), Shards(tmp_path, SPACE, limit))
    assert "the embedding cache is full; 10 rows were not kept" in caplog.text
    assert sum(path.stat().st_size for path in shard_files(tmp_path)) <= limit
    found, _ = run(images, tmp_path)
    assert (found.found, torch.equal(found.features, expected(images, 1))) == (20, True)


def test_a_disk_that_takes_no_more_ends_the_keeping_and_not_the_computing(tmp_path: Path, monkeypatch, caplog) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("clinifed.models.shards.write_atomic", full)
    images = [content(n) for n in range(5)]
    found, _ = run(images, tmp_path)
    assert torch.equal(found.features, expected(images, 1))
    assert "No space left on device" in caplog.text
    assert shard_files(tmp_path) == []


SCRIPT = """
import sys
from pathlib import Path
import torch
from clinifed.models import embedding
from clinifed.models.shards import Shards
embedding.SHARD_ROWS = 8
images = [f"{n:064x}" for n in range(200)]
def encode(numbers, views):
    for start in range(0, len(numbers), 8):
        some = list(numbers[start:start + 8])
        yield some, torch.tensor(some, dtype=torch.float32).reshape(-1, 1, 1).expand(-1, 1, 6)
for _ in range(3):
    found = embedding.embed_images(images, 1, encode, Shards(Path(sys.argv[1]), {"base": "x"}))
    assert torch.equal(found.features[:, 0], torch.arange(200.0)), found
    assert found.damaged == 0, found
print(found.found)
"""


def test_processes_that_share_a_cache_do_not_disturb_each_other(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    started = [
        subprocess.Popen([sys.executable, "-c", SCRIPT, str(folder)], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    assert [(process.communicate(timeout=120)[0].strip(), process.returncode) for process in started] == [
        ("200", 0)
    ] * 3
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []


def test_wiping_removes_all_of_ours_and_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    run([content(n) for n in range(5)], folder)
    (folder / f"{'0' * 32}.safetensors").write_bytes(b"of an earlier release")
    (folder / f".{'0' * 16}-{'1' * 32}.safetensors.77.tmp").write_bytes(b"of a process that was killed")
    wiped = wipe(folder)
    assert wiped.shards == 2
    assert wiped.size_bytes > 5 * row_bytes(WIDTH)
    assert not folder.exists()


@pytest.mark.parametrize("name", ["notes.txt", "model.safetensors", f"{'0' * 16}-{'g' * 32}.safetensors", ".x.1.tmp"])
def test_a_folder_with_anything_else_is_not_touched(tmp_path: Path, name: str) -> None:
    run([content(0)], tmp_path / "cache")
    (tmp_path / "cache" / name).write_text("somebody's")
    before = sorted(path.name for path in (tmp_path / "cache").iterdir())
    with pytest.raises(DataError, match="nothing was removed"):
        wipe(tmp_path / "cache")
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == before


def test_neither_folders_nor_links_named_like_shards_are_removed(tmp_path: Path) -> None:
    folder, target = tmp_path / "cache", tmp_path / "precious"
    run([content(0)], folder)
    target.write_text("precious")
    link = folder / f"{'0' * 16}-{'1' * 32}.safetensors"
    link.symlink_to(target)
    with pytest.raises(DataError, match="nothing was removed"):
        wipe(folder)
    link.unlink()
    link.mkdir()
    with pytest.raises(DataError, match="nothing was removed"):
        wipe(folder)
    with pytest.raises(DataError, match="no such folder"):
        wipe(target)
    assert target.read_text() == "precious"


def test_what_a_dead_process_left_is_removed_in_time(tmp_path: Path) -> None:
    run([content(0)], tmp_path)
    left = tmp_path / f".{'0' * 16}-{'1' * 32}.safetensors.77.tmp"
    left.write_bytes(b"half")
    Shards(tmp_path, SPACE)
    assert left.exists()
    os.utime(left, (1, 1))
    Shards(tmp_path, SPACE)
    assert not left.exists()
