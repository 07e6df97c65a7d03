"""The documents of the benchmark of quality."""

import pytest

from longvq_layers.benchmarks.quality import documents


def test_documents_are_distinct_deterministic_and_split_by_package(monkeypatch):
    monkeypatch.setattr(documents, "_module_documents", lambda path, characters, seen: [str(path)])
    calibration, held_out = documents.documents(5, 9)
    assert (len(calibration), len(held_out)) == (5, 9)
    assert (calibration, held_out) == documents.documents(5, 9)
    names = {str(path): name.partition(".")[0] for path, name in documents.library_files()}
    assert not {names[text] for text in calibration} & {names[text] for text in held_out}


def test_a_document_is_docstrings_of_one_file_up_to_its_length(tmp_path):
    file = tmp_path / "module.py"
    docstrings = [f"Docstring number {number} " + "word " * 39 + "end." for number in range(5)]
    file.write_text("\n".join(f'def f{n}():\n    """{text}"""' for n, text in enumerate(docstrings)))
    seen: set[str] = set()
    found = documents._module_documents(file, 400, seen)
    assert [len(document) for document in found] == [400, 400, len(docstrings[4])]
    assert found[0].startswith("Docstring number 0") and "Docstring number 1" in found[0]
    assert documents._module_documents(file, 400, seen) == []  # no docstring twice


def test_a_file_that_is_not_python_gives_nothing(tmp_path):
    file = tmp_path / "bad.py"
    file.write_text("def (:")
    assert documents._module_documents(file, 400, set()) == []


def test_too_few_documents_are_an_error(monkeypatch):
    monkeypatch.setattr(documents, "library_files", lambda: [])
    with pytest.raises(ValueError, match="must give 3 calibration documents, got 0"):
        documents.documents(3, 1)
