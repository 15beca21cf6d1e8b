"""Python's own sources and their splits, against the definition and files made here."""

import hashlib
import json

from data_samples import source_names

from pardec.data.python_sources import TEST, TRAIN, VALIDATION, python_files, python_sources, split_of, stdlib_folder


def test_splits_go_by_the_hash_of_the_path():
    """First byte below 10 is held out; of these an even second byte is validation, an odd one test."""
    seen = {TRAIN: 0, VALIDATION: 0, TEST: 0}
    for number in range(3000):
        path = f"package/module_{number}.py"
        digest = hashlib.sha256(path.encode()).hexdigest()
        first, second = int(digest[:2], 16), int(digest[2:4], 16)
        expected = TRAIN if first >= 10 else (VALIDATION, TEST)[second % 2]
        assert split_of(path) == expected
        seen[expected] += 1
    assert min(seen.values()) > 30


def test_python_files_are_the_sources_of_a_library(source_folder):
    (source_folder / "smallest.py").write_text("x" * 200)
    (source_folder / "largest.py").write_text("x" * 400_000)
    names = [path.relative_to(source_folder).as_posix() for path in python_files(source_folder)]
    assert sorted(names) == sorted([*source_names(), "smallest.py", "largest.py"])
    assert python_files(source_folder) == sorted(python_files(source_folder))


def test_folders_above_the_library_do_not_matter(tmp_path):
    """An interpreter may itself live below a folder called site-packages."""
    folder = tmp_path / "site-packages" / "python"
    folder.mkdir(parents=True)
    (folder / "module.py").write_text("x = 1\n" * 50)
    assert [path.name for path in python_files(folder)] == ["module.py"]


def test_python_sources_are_the_texts_of_one_split(source_folder):
    texts = {split: list(python_sources(source_folder, split)) for split in (TRAIN, VALIDATION, TEST)}
    for split, found in texts.items():
        expected = [
            path.read_text()
            for path in python_files(source_folder)
            if split_of(str(path.relative_to(source_folder))) == split
        ]
        assert found == expected
    assert {split: len(found) for split, found in texts.items()} == {TRAIN: 60, VALIDATION: 3, TEST: 3}
    assert len(set().union(*texts.values())) == 66


def test_sources_that_are_not_utf8_are_left_out(tmp_path):
    name = next(f"n{i}.py" for i in range(1000) if split_of(f"n{i}.py") == TRAIN)
    (tmp_path / name).write_bytes(b"\xff\xfe" * 200)
    assert python_files(tmp_path) == [tmp_path / name]
    assert list(python_sources(tmp_path, TRAIN)) == []


def test_the_standard_library_is_that_of_the_running_interpreter():
    assert (stdlib_folder() / "json" / "decoder.py").samefile(json.decoder.__file__)
