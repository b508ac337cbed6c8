"""Pushing and pulling against a stand-in of a hub (``support.hub``)."""

import json
import shutil
from contextlib import suppress

import pytest
from support.hub import ENDPOINT
from support.reliability import assert_one_error_line, assert_same_files, flip_bit, run, run_killed, truncate
from zoo_common import Zoo, fetch_file, pull_zoo, push_file, push_zoo
from zoo_common.cli import main

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # of huggingface_hub's upload

REPO = "somebody/digits"
KEY = f"datasets/{REPO}"


def test_a_zoo_that_is_pushed_and_pulled_is_the_same(hub, zoo, tmp_path):
    (zoo.path / "shards" / ".0123-unfinished.safetensors").write_bytes(b"x")
    (zoo.path / "notes.txt").write_text("not of the zoo")
    commit = push_zoo(zoo.path, REPO)
    expected = {"zoo.json", f"layouts/{zoo.layout.id}.json", *(f"shards/{i}.safetensors" for i in range(3))}
    assert hub.files(KEY).keys() == expected | {".gitattributes"}
    assert pull_zoo(REPO, tmp_path / "new" / ".." / "copy") == commit
    (zoo.path / "notes.txt").unlink()
    assert_same_files(tmp_path / "copy", zoo.path)
    for path in expected:
        assert (tmp_path / "copy" / path).read_bytes() == (zoo.path / path).read_bytes()
    assert not list(tmp_path.glob(".*"))


def test_what_is_on_the_hub_is_not_sent_again(hub, zoo, make_run):
    push_zoo(zoo.path, REPO)
    zoo.append([make_run("e")], name="3")
    before = len(hub.requests)
    push_zoo(zoo.path, REPO)
    assert sum(line.startswith("PUT") for line in hub.requests[before:]) == 1
    assert "shards/3.safetensors" in hub.files(KEY)
    push_zoo(zoo.path, REPO)


def test_pulling_again_adds_what_is_new_and_keeps_what_is_ours(hub, zoo, make_run, tmp_path):
    push_zoo(zoo.path, REPO)
    pull_zoo(REPO, tmp_path / "copy")
    Zoo.open(tmp_path / "copy").append([make_run("ours")], name="ours")
    zoo.append([make_run("e")], name="3")
    push_zoo(zoo.path, REPO)
    before = len(hub.downloads())
    pull_zoo(REPO, tmp_path / "copy")
    assert set(Zoo.open(tmp_path / "copy").run_ids) == {"a", "b", "c", "d", "e", "ours"}
    assert "3.safetensors" in hub.downloads()[before:] and "2.safetensors" not in hub.downloads()[before:]


def test_a_revision_is_a_branch_or_a_commit(hub, zoo, make_run, tmp_path):
    first = push_zoo(zoo.path, REPO)
    zoo.append([make_run("e")], name="3")
    branch = push_zoo(zoo.path, REPO, revision="more")
    assert len(hub.files(KEY)) + 1 == len(hub.files(KEY, "more"))
    for revision, commit, runs in ((None, first, 4), ("more", branch, 5), (first, first, 4), (branch, branch, 5)):
        folder = tmp_path / str(revision)
        assert pull_zoo(REPO, folder, revision=revision) == commit
        assert len(Zoo.open(folder)) == runs


def test_without_a_connection_the_cache_serves(hub, zoo, tmp_path):
    commit = push_zoo(zoo.path, REPO)
    pull_zoo(REPO, tmp_path / "first")
    before = len(hub.requests)
    assert pull_zoo(REPO, tmp_path / "second", offline=True) == commit
    assert len(hub.requests) == before
    hub.status = 503
    assert pull_zoo(REPO, tmp_path / "third") == commit
    assert_same_files(tmp_path / "third", zoo.path)


@pytest.fixture
def impatient(monkeypatch):
    """``huggingface_hub`` keeps 10 MB in memory at a time, and waits a second before it asks again."""
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 100)
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)


def test_pushing_leaves_no_part_in_the_cache(hub, zoo, tmp_path):
    push_zoo(zoo.path, REPO)
    push_zoo(zoo.path, REPO)
    with pytest.raises(FileNotFoundError, match="not completely, in the cache"):
        pull_zoo(REPO, tmp_path / "copy", offline=True)


SHARD = "shards/1.safetensors"


@pytest.mark.usefixtures("impatient")
def test_a_download_that_is_cut_goes_on_where_it_was(hub, zoo, tmp_path):
    push_zoo(zoo.path, REPO)
    hub.cuts[SHARD] = [1000]
    with suppress(ConnectionError):  # newer versions repeat by themselves
        pull_zoo(REPO, tmp_path / "copy")
    if not (tmp_path / "copy").exists():
        pull_zoo(REPO, tmp_path / "copy")
    assert_same_files(tmp_path / "copy", zoo.path)
    assert hub.downloads().count("1.safetensors bytes=1000-") == 1


@pytest.mark.usefixtures("impatient")
def test_a_pull_that_failed_shows_nothing_and_goes_on_where_it_was(hub, zoo, tmp_path):
    push_zoo(zoo.path, REPO)
    hub.cuts[SHARD] = [1000] + [0] * 20
    with pytest.raises(ConnectionError, match=r"somebody/digits .*: repeat this, it goes on"):
        pull_zoo(REPO, tmp_path / "copy")
    with pytest.raises(FileNotFoundError, match="not completely, in the cache"):
        pull_zoo(REPO, tmp_path / "copy", offline=True)
    assert not (tmp_path / "copy").exists()
    hub.cuts.clear()
    before = len(hub.downloads())
    pull_zoo(REPO, tmp_path / "copy")
    assert_same_files(tmp_path / "copy", zoo.path)
    again = {line.partition(" ")[0] for line in hub.downloads()[before:]}  # not all versions go on within a file
    assert again == {"1.safetensors", "zoo.json"}


def test_a_damaged_zoo_is_neither_sent_nor_pulled(hub, zoo, tmp_path):
    push_zoo(zoo.path, REPO)
    shard = zoo.path / "shards" / "1.safetensors"
    truncate(shard)
    with pytest.raises(ValueError, match=r"zoo is not sent: 1 problem.*1\.safetensors is truncated"):
        push_zoo(zoo.path, "somebody/other")
    assert "datasets/somebody/other" not in hub.repositories
    hub.commit(KEY, "main", {"shards/1.safetensors": shard.read_bytes()})
    with pytest.raises(ValueError, match=r"somebody/digits is damaged; .*remove .*1\.safetensors is truncated"):
        pull_zoo(REPO, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_a_damaged_cache_is_found_and_the_remedy_helps(hub, zoo, tmp_path):
    push_zoo(zoo.path, REPO)
    pull_zoo(REPO, tmp_path / "first")
    flip_bit((tmp_path / "first" / "shards" / "0.safetensors"), seed=1)  # the same file on disk as in the cache
    with pytest.raises(ValueError, match="in the cache: remove") as caught:
        pull_zoo(REPO, tmp_path / "copy")
    folder = str(caught.value).partition("remove ")[2].partition(" and repeat")[0]
    assert folder.startswith(str(tmp_path / "hub-cache"))
    shutil.rmtree(folder)
    pull_zoo(REPO, tmp_path / "copy")
    assert_same_files(tmp_path / "copy", zoo.path)


def test_another_zoo_is_never_mixed_in(hub, zoo, layout, tmp_path):
    push_zoo(zoo.path, REPO)
    other = Zoo.create(tmp_path / "other", layout=layout, task="another")
    with pytest.raises(ValueError, match=r"somebody/digits holds another zoo \(other task\): choose another"):
        push_zoo(other.path, REPO)
    with pytest.raises(ValueError, match="cannot merge"):
        pull_zoo(REPO, other.path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(FileExistsError, match="holds other files: choose a new folder"):
        pull_zoo(REPO, tmp_path / "full")


@pytest.mark.parametrize(
    ("error", "match", "change"),
    [
        (FileNotFoundError, "^ENDPOINT has no repository nobody/nothing.*HF_TOKEN", {"repo": "nobody/nothing"}),
        (FileNotFoundError, "^somebody/digits has no revision 'v9': give", {"revision": "v9"}),
        (
            FileNotFoundError,
            "^nobody/nothing is not.* in the cache .*offline",
            {"repo": "nobody/nothing", "offline": True},
        ),
        (FileNotFoundError, "^somebody/text has no zoo.json: it holds something else", {"repo": "somebody/text"}),
        (ValueError, "^'a/b/c' does not name a repository", {"repo": "a/b/c"}),
    ],
)
def test_what_cannot_be_pulled_is_named(hub, zoo, tmp_path, error, match, change):
    push_zoo(zoo.path, REPO)
    hub.commit("datasets/somebody/text", "main", {"README.md": b"text"})
    with pytest.raises(error, match=match.replace("ENDPOINT", ENDPOINT)):
        pull_zoo(**{"repo": REPO, "path": tmp_path / "copy", **change})
    assert not (tmp_path / "copy").exists()


def test_without_a_token_nothing_is_sent_and_private_is_private(hub, zoo, tmp_path, monkeypatch):
    push_zoo(zoo.path, REPO, private=True)
    assert hub.private == {KEY}
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(PermissionError, match="refuses somebody/other: set HF_TOKEN"):
        push_zoo(zoo.path, "somebody/other")
    with pytest.raises(FileNotFoundError, match=r"no repository somebody/digits, or a private one"):
        pull_zoo(REPO, tmp_path / "copy")


def test_a_hub_that_is_not_there(zoo, tmp_path):
    with pytest.raises(ConnectionError, match=rf"^{ENDPOINT} cannot be reached for somebody/digits"):
        push_zoo(zoo.path, REPO)
    with pytest.raises(FileNotFoundError, match=rf"^somebody/digits is not.* {ENDPOINT} was not reached"):
        pull_zoo(REPO, tmp_path / "copy")


def test_a_file_of_a_model_is_here_or_on_the_hub(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"first")
    commit = push_file("model.safetensors", "me/model", "model.safetensors")
    (tmp_path / "model.safetensors").write_bytes(b"second")
    push_file("model.safetensors", "me/model", "model.safetensors")
    assert fetch_file("me/model", "model.safetensors").read_bytes() == b"second"
    assert fetch_file(f"me/model@{commit}", "model.safetensors").read_bytes() == b"first"
    assert fetch_file("me/model", "model.safetensors", revision=commit, offline=True).read_bytes() == b"first"
    assert fetch_file("model.safetensors", "other") == tmp_path.relative_to(tmp_path) / "model.safetensors"
    assert fetch_file(tmp_path, "model.safetensors") == tmp_path / "model.safetensors"
    (tmp_path / "me").mkdir()
    before = len(hub.requests)
    for name in ("me/model", "nothing", tmp_path / "nothing", "a/b/c"):
        with pytest.raises(FileNotFoundError, match=r"there is no file or folder .*owner/name@revision"):
            fetch_file(name, "model.safetensors")
    assert len(hub.requests) == before
    assert fetch_file("me/model@main", "model.safetensors").read_bytes() == b"second"


def test_the_commands(hub, zoo, tmp_path, capsys):
    assert main(["push", str(zoo.path), REPO, "--revision", "v1", "--private", "--json"]) == 0
    pushed = json.loads(capsys.readouterr().out)
    assert main(["pull", REPO, str(tmp_path / "copy"), "--revision", "v1", "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {**pushed, "zoo": str(tmp_path / "copy")} and not captured.err
    assert_same_files(tmp_path / "copy", zoo.path)


def test_offline_without_a_cache_is_one_line(zoo, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    result = run(["zoo", "pull", REPO, tmp_path / "copy"])
    assert_one_error_line(result, "zoo: somebody/digits is not", "(offline?): repeat this with a connection")
    assert_one_error_line(
        run(["zoo", "push", zoo.path, REPO]), "cannot be reached for somebody/digits", "HF_HUB_OFFLINE"
    )
    assert not (tmp_path / "copy").exists()


@pytest.mark.reliability
def test_a_pull_that_is_killed_and_run_again_ends_well(hub, layout, make_run, tmp_path):
    zoo = Zoo.create(tmp_path / "zoo", layout=layout, task="digits_loss")
    for i in range(40):
        zoo.append([make_run(f"r{i}")], name=str(i))
    push_zoo(zoo.path, REPO)
    assert run_killed(["zoo", "pull", REPO, tmp_path / "copy"], watch=tmp_path, seed=0, kills=6) > 0
    assert_same_files(tmp_path / "copy", zoo.path)
    assert not list(tmp_path.glob(".*"))
