"""fusedres.compiler.folders: binaries that were compiled elsewhere are found, and others are named."""

import json
import shutil
import warnings

import pytest

from fusedres.compiler import folders
from fusedres.compiler.ahead import compile_ahead, missing_of
from fusedres.compiler.folders import Manifest, NotBinaries, check, found_for, held, made_with, read, use_for, write
from fusedres.compiler.known import compile_binary
from tests.small_kernels import copy, matmul, triton


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """A folder of two binaries of one target and one of another."""
    folder = tmp_path_factory.mktemp("compiled")
    compile_ahead([copy(), matmul()], "sm_90", folder=folder)
    compile_ahead([copy()], "sm_80", folder=folder)
    write(folder, "sm_80", ["small"], held(folder, "sm_80"))
    write(folder, "sm_90", ["small", "other"], held(folder, "sm_90"))
    return folder


@pytest.fixture
def elsewhere(compiled, tmp_path, monkeypatch):
    """The cache of another machine, to which that folder was copied, and whose Triton has compiled nothing."""
    monkeypatch.setenv("FUSEDRES_CACHE", str(tmp_path / "fusedres"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    monkeypatch.setattr(folders, "_used", {})
    monkeypatch.setattr(folders, "_said", set())
    shutil.copytree(compiled, tmp_path / "fusedres" / "binaries" / "copied")
    with triton.knobs.cache.scope():
        yield tmp_path / "fusedres" / "binaries" / "copied"


def test_a_folder_says_what_it_holds(compiled):
    told = read(compiled)
    assert told == Manifest(made_with(), {"sm_80": 1, "sm_90": 2}, ("small", "other"))
    assert told.made_with["triton"] == triton.__version__
    assert [held(compiled, target) for target in ("sm_80", "sm_90", "gfx942")] == [1, 2, 0]
    check(compiled)


def test_what_was_copied_is_found_and_nothing_else_is_hidden(elsewhere):
    every = [copy(), matmul(), copy(num_warps=8)]
    assert missing_of(every, "sm_90") == every
    use_for("sm_90")
    assert missing_of(every, "sm_90") == every[2:]
    for binary in every[:2]:
        assert compile_binary(binary, "sm_90").asm["cubin"][:4] == b"\x7fELF"
    # What is compiled anew goes where the user has Triton's cache.
    assert compile_ahead(every[2:], "sm_90")[every[2]].error is None
    cache = elsewhere.parents[2] / "triton"
    assert [path.name for path in cache.glob("*/*.cubin")] == ["copy_kernel.cubin"]
    assert missing_of(every, "sm_90") == []


def test_the_folder_itself_may_be_one(elsewhere, monkeypatch):
    monkeypatch.setenv("FUSEDRES_CACHE", str(elsewhere.parent / "mine"))
    shutil.copytree(elsewhere, elsewhere.parent / "mine" / "binaries")
    assert found_for("sm_90") == [elsewhere.parent / "mine" / "binaries"]
    use_for("sm_90")
    assert missing_of([copy()], "sm_90") == []


def test_a_binary_that_lacks_a_file_is_compiled(elsewhere):
    next(elsewhere.glob("*/matmul_kernel.cubin")).unlink()
    use_for("sm_90")
    assert missing_of([copy(), matmul()], "sm_90") == [matmul()]


def test_a_cache_manager_of_the_program_stays_in_force(elsewhere):
    from triton.runtime.cache import FileCacheManager

    asked = []

    class Mine(FileCacheManager):
        def get_group(self, filename):
            asked.append(filename)
            return super().get_group(filename)

    triton.knobs.cache.manager_class = Mine
    use_for("sm_90")
    assert missing_of([copy()], "sm_90") == []
    assert asked == ["copy_kernel.json"]
    manager = triton.knobs.cache.manager_class
    use_for("sm_90")
    assert triton.knobs.cache.manager_class is manager and issubclass(manager, Mine)


def changed(folder, **parts):
    path = folder / "manifest.json"
    told = json.loads(path.read_text())
    told["made_with"].update(parts.pop("made_with", {}))
    path.write_text(json.dumps({**told, **parts}))


@pytest.mark.parametrize(
    ("parts", "target", "words"),
    [
        ({"made_with": {"triton": "3.5.0"}}, "sm_90", rf"made with triton 3\.5\.0, here {triton.__version__}$"),
        ({"made_with": {"kernels": "old"}}, "sm_90", "made with kernels old, here [0-9a-f]{12}$"),
        ({}, "sm_89", "compiled for sm_80, sm_90, and this is sm_89$"),
        ({"fusedres binaries": 2}, "sm_90", r"manifest\.json can not be read \(expected format 1, got 2\)$"),
        ({"targets": 3}, "sm_90", r"manifest\.json can not be read \(AttributeError"),
    ],
)
def test_what_does_not_fit_is_said_once(elsewhere, parts, target, words):
    changed(elsewhere, **parts)
    with pytest.warns(UserWarning, match=words) as said:
        use_for(target)
    assert len(said) == 1 and str(elsewhere) in str(said[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        use_for(target)
    assert triton.knobs.cache.manager_class is None


def test_without_folders_nothing_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("FUSEDRES_CACHE", str(tmp_path / "none"))
    with triton.knobs.cache.scope():
        use_for("sm_90")
        assert triton.knobs.cache.manager_class is None


def test_folders_that_are_no_place_for_binaries(elsewhere, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="out: expected a folder, got the file"):
        check(tmp_path / "file")
    with pytest.raises(ValueError, match="out: expected a new or empty folder, or one that fusedres compile made, got"):
        check(tmp_path)
    changed(elsewhere, made_with={"triton": "3.5.0"})
    with pytest.raises(ValueError, match=r"out: expected a folder of these versions, got .*triton 3\.5\.0, here"):
        check(elsewhere)
    (elsewhere / "manifest.json").write_text("nonsense")
    with pytest.raises(ValueError, match=r"out: expected a folder for binaries, got .*whose manifest\.json is none"):
        check(elsewhere)
    with pytest.raises(NotBinaries, match="JSONDecodeError"):
        read(elsewhere)
    check(tmp_path / "new")
    assert not (tmp_path / "new").exists()
