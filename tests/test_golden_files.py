"""Golden files that lack cases are told from golden files that are right."""

import types

import pytest
from support.golden import Absent, Golden, _cases, pytest_collection_modifyitems, pytest_runtest_setup


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "values.json"
    path.write_text('{"full": {"a": {"x": 1}, "b": {"x": 2}}, "empty": []}')
    return path


def kept(*goldens):
    """The items of a collection that are run."""
    items = [types.SimpleNamespace(callspec=types.SimpleNamespace(params={"golden": golden})) for golden in goldens]
    hook = types.SimpleNamespace(pytest_deselected=lambda items: None)
    pytest_collection_modifyitems(types.SimpleNamespace(hook=hook), items)
    return items


def test_every_entry_is_a_case(file):
    assert [(golden.name, golden.case) for golden in _cases(file, "full")] == [("a", {"x": 1}), ("b", {"x": 2})]


@pytest.mark.parametrize(("where", "why"), [("none", "has no 'none' .it has full, empty"), ("empty", "has no case")])
def test_a_file_without_a_case_fails(file, where, why):
    (item,) = kept(*_cases(file, where))
    with pytest.raises(pytest.fail.Exception, match=why):
        pytest_runtest_setup(item)


def test_an_empty_list_beside_others_is_passed_over_but_not_a_missing_one(file):
    found = [*_cases(file, "full"), *_cases(file, "empty"), *_cases(file, "none"), Absent(None)]
    goldens = [item.callspec.params["golden"] for item in kept(*found)]
    assert [type(golden) for golden in goldens] == [Golden, Golden, Absent] and goldens[2].fatal
    assert len(kept(*_cases(file, "full"), *_cases(file, "none", one_of_many=True))) == 2
