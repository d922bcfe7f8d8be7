"""Files that are whole or not there, and jobs that continue."""

import pytest

from plumbing.files import continue_job, write_atomically



def test_writing_is_all_or_nothing(tmp_path, monkeypatch):
    """Fails if a failed write leaves half a file under the name, or litter beside it."""
    def fail(*_):
        raise OSError("disk full")

    path = tmp_path / "x.json"
    write_atomically(path, "old")
    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError):
        write_atomically(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_job_continues_from_any_byte(tmp_path):
    """Fails if a result is lost, doubled or computed again, or if half a line is taken for one."""
    part, asked = tmp_path / "x.part", []

    def work(unit):
        asked.append(unit)
        return {"unit": unit, "text": "a\u2028b\n é"}

    def run(units=range(5), **about):
        return list(continue_job(part, {"seed": 1, **about}, units, work))

    due = run()
    assert asked == list(range(5)) and due[3] == {"unit": 3, "text": "a\u2028b\n é"}
    begun = part.read_bytes()
    for size in range(len(begun) + 1):
        part.write_bytes(begun[:size])
        asked.clear()
        whole = max(begun[:size].count(b"\n") - 1, 0)
        assert run() == due and asked == list(range(5))[whole:]
        assert part.read_bytes() == begun


def test_a_job_of_another_kind_is_refused(tmp_path):
    """Fails if results of other arguments are taken for these, or cannot be replaced when asked, or
    if a file without results is refused."""
    part = tmp_path / "x.part"
    list(continue_job(part, {"seed": 1}, [1, 2], str))
    with pytest.raises(ValueError, match="x.part was begun with other arguments"):
        list(continue_job(part, {"seed": 2}, [1, 2], str))
    assert list(continue_job(part, {"seed": 2}, [1], repr, overwrite=True)) == ["1"]

    # but a job that failed before its first result may be given other arguments
    part.write_text('{"endpoint": "wrong"}\n')
    assert list(continue_job(part, {"endpoint": "right"}, [1], repr)) == ["1"]


def test_a_damaged_job_is_refused_by_name(tmp_path):
    """Fails if a surplus or a broken line is taken for a result, or the file is not named."""
    part = tmp_path / "x.part"
    list(continue_job(part, {}, [1, 2], str))
    whole = part.read_bytes()
    for line, words in ((b'"3"\n', "more results"), (b"{\n", "x.part:4: damaged")):
        part.write_bytes(whole + line)
        units = [1, 2] if words == "more results" else [1, 2, 3]
        with pytest.raises(ValueError, match=f"x.part.*{words.removeprefix('x.part')}"):
            list(continue_job(part, {}, units, str))
        assert part.read_bytes() == whole + line


def test_a_job_that_fails_keeps_what_it_has(tmp_path):
    """Fails if an error loses the results before it."""
    part = tmp_path / "x.part"
    with pytest.raises(ZeroDivisionError):
        list(continue_job(part, {}, [2, 1, 0, 5], lambda n: 2 / n))
    assert list(continue_job(part, {}, [2, 1], lambda n: 1 / 0)) == [1.0, 2.0]
