"""Whatever the model or the network does, a made file holds right sentences, and each class is made once."""

import email.utils
import json
import os
import signal
import subprocess
import sys
import time
from itertools import count
from pathlib import Path

import claver_k400
import pytest
from chat_server import ChatServer, asked, entry_for, fails, first, good, made_up_sentence, says
from claver.prompts.files import load_prompts, read_prompt_file, write_prompt_file
from claver.prompts.maker import MakerSettings, make_prompts
from claver.prompts.models import Endpoint, ModelError, _retry_after
from claver.prompts.request import PROMPT_VERSION

COMMAND = Path(claver_k400.__file__)
CLASSES = [
    "juggling eggs",
    "folding a map",
    "riding an ostrich",
    "ironing shirts",
    "milking a goat",
    "sweeping a chimney",
]
KEY = "sk-this-key-is-secret-0123456789"


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


def make(server, out, classes=CLASSES, timeout=5.0, **settings):
    settings = MakerSettings(**({"backoff": 0.01, "concurrency": 2} | settings))
    return make_prompts(classes, out, Endpoint("small-model", server.url, timeout), settings, progress=False)


def test_a_file_is_made_for_every_class_and_says_how(tmp_path):
    out = tmp_path / "prompts.json"
    with ChatServer() as server:
        made = make(server, out, seed=7, price_in=2.0, price_out=10.0)
    assert (made.made, made.found, made.failed) == (len(CLASSES), 0, {})
    assert load_prompts(out, CLASSES) == {name: entry_for(name) for name in CLASSES}
    file = read_prompt_file(out)
    assert list(file.entries) == CLASSES
    record = file.header["made"]
    assert (record["model"], record["endpoint"], record["seed"]) == ("small-model", server.url.removesuffix("/v1"), 7)
    assert (record["temperature"], record["top_p"], record["prompt_version"]) == (0.9, 0.95, PROMPT_VERSION)
    assert record["usage"] == {"requests": 6, "prompt_tokens": 600, "completion_tokens": 60, "cost": 0.0018}
    assert {"date", "versions"} <= record.keys()
    assert {(request["temperature"], request["top_p"], request["model"]) for request in server.requests} == {
        (0.9, 0.95, "small-model")
    }
    assert len({request["seed"] for request in server.requests}) == len(CLASSES)
    assert os.listdir(tmp_path) == ["prompts.json"]


def test_kinds_and_numbers_can_be_chosen(tmp_path):
    with ChatServer(lambda request: says(json.dumps(entry_for(asked(request)[0], ("scene",), 3)))) as server:
        make(server, tmp_path / "p.json", kinds=("scene",), per_kind=3)
    assert load_prompts(tmp_path / "p.json", CLASSES) == {name: entry_for(name, ("scene",), 3) for name in CLASSES}
    assert json.loads(server.requests[0]["messages"][-1]["content"])["sentences_per_kind"] == 3


def test_no_more_requests_run_at_a_time_than_allowed(tmp_path):
    with ChatServer(seconds=0.05) as server:
        make(server, tmp_path / "p.json", concurrency=3)
    assert server.most == 3


@pytest.mark.parametrize("after", ["0.4", None])
def test_a_rate_limit_is_waited_for_by_all(tmp_path, after):
    numbers = count()
    headers = {"Retry-After": after} if after else {}

    def limited(request):
        return fails(429, "slow down", headers) if next(numbers) == 1 else good(request)

    with ChatServer(limited) as server:
        made = make(server, tmp_path / "p.json", concurrency=1, backoff=0.2)
    assert made.made == len(CLASSES)
    assert len(server.requests) == len(CLASSES) + 1
    assert server.times[2] - server.times[1] >= (0.4 if after else 0.2)


def test_a_server_says_in_several_ways_how_long_to_wait():
    in_a_minute = email.utils.formatdate(time.time() + 60, usegmt=True)
    assert _retry_after({"retry-after": in_a_minute}) == pytest.approx(60, abs=2)
    assert _retry_after({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}) == 0
    assert _retry_after({"retry-after-ms": "250", "retry-after": "9"}) == 0.25
    assert _retry_after({"retry-after": "soon"}) is None
    assert _retry_after({}) is None


@pytest.mark.parametrize(
    "answer",
    [
        fails(500, "broken"),
        fails(503, "busy"),
        says("slow") | {"seconds": 1.0},
        {"status": 200, "raw": b"<html>no JSON"},
        {"status": 200, "raw": b"{}"},
        {"status": 200, "raw": b'{"choices": []}'},
    ],
    ids=["500", "503", "timeout", "html", "empty", "no choices"],
)
def test_what_passes_is_asked_again(tmp_path, answer):
    with ChatServer(first(answer)) as server:
        made = make(server, tmp_path / "p.json", CLASSES[:2], timeout=0.3)
    assert (made.made, made.failed) == (2, {})
    assert len(server.requests) == 4


LONG = "A person " + " ".join(f"extraordinarily{i}" for i in range(40)) + "."


def spoilt(change):
    """A reply whose scene is changed."""

    def answer(request):
        name, kinds = asked(request)
        entry = entry_for(name, tuple(kinds))
        change(name, entry)
        return says(json.dumps(entry))

    return answer


def replace(text):
    return spoilt(lambda name, entry: entry["scene"].__setitem__(0, text))


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        (says('{"scene": ["half a'), "not valid JSON"),
        (replace(LONG), "CLIP tokens, at most 77 fit"),
        (replace("Somebody folds a map on the table."), "names the other action folding a map"),
        (replace("two\nlines of it"), "line breaks"),
        (replace("{action} in a room."), "no prose"),
        (replace("An egg \ud83d moves up high."), "half of a surrogate pair"),
        (says('{"scene": ["An egg \ud83d moves'), "not valid JSON"),
        (spoilt(lambda name, entry: entry["scene"].pop()), "4 sentences, not 5"),
        (spoilt(lambda name, entry: entry.pop("scene")), "scene is missing"),
        (spoilt(lambda name, entry: entry.update(scene="one")), "not a list of strings"),
        (spoilt(lambda name, entry: entry["scene"].__setitem__(1, entry["scene"][0])), "repeats another sentence"),
        (spoilt(lambda name, entry: entry["scene"].__setitem__(1, entry["synonyms"][0])), "repeats another sentence"),
    ],
    ids=[
        "json",
        "long",
        "name",
        "lines",
        "braces",
        "surrogate",
        "raw surrogate",
        "number",
        "kind",
        "type",
        "twice",
        "twice in two kinds",
    ],
)
def test_a_wrong_reply_is_told_its_faults_and_mended(tmp_path, answer, fault):
    classes = ["juggling eggs", "folding a map"]
    wrong_once = first(answer)
    with ChatServer(lambda request: (wrong_once if asked(request)[0] == classes[0] else good)(request)) as server:
        made = make(server, tmp_path / "p.json", classes, concurrency=1)
    assert made.failed == {}
    wrong = [request for request in server.requests if len(request["messages"]) > 6]
    assert wrong
    again = json.loads(wrong[0]["messages"][-1]["content"])
    assert any(fault in each for each in again["wrong_with_the_reply"])
    assert "scene" in again["kinds"]
    if "JSON" not in fault and "surrogate" not in fault:  # what was right is kept
        assert "decomposition" not in again["kinds"]
    assert load_prompts(tmp_path / "p.json", classes) == {name: entry_for(name) for name in classes}


def test_a_reply_that_is_cut_off_is_given_more_room(tmp_path):
    with ChatServer(first(says('{"scene": ["half', "length"))) as server:
        make(server, tmp_path / "p.json", CLASSES[:1], max_tokens=500)
    assert [request["max_tokens"] for request in server.requests] == [500, 1000]
    assert len(server.requests[1]["messages"]) == len(server.requests[0]["messages"])


@pytest.mark.parametrize(
    "answer",
    [says(None, refusal="I cannot help with that."), says(None, "content_filter"), says("I'm sorry, I can't do that.")],
    ids=["refusal", "filter", "prose"],
)
def test_a_refusal_is_asked_again_from_the_start_with_another_seed(tmp_path, answer):
    with ChatServer(first(answer)) as server:
        made = make(server, tmp_path / "p.json", CLASSES[:1])
    assert made.failed == {}
    assert server.requests[0]["messages"] == server.requests[1]["messages"]
    assert server.requests[0]["seed"] != server.requests[1]["seed"]


def test_a_class_that_never_comes_right_is_reported_and_tried_again_by_the_next_run(tmp_path, capsys):
    names = tmp_path / "names.txt"
    names.write_text("\n".join(CLASSES) + "\n")
    out = tmp_path / "p.json"
    command = ["prompts", "make", "--classes", str(names), "--out", str(out), "--model", "m", "--attempts", "2"]

    def never(request):
        return says("I'm sorry.") if asked(request)[0] == CLASSES[2] else good(request)

    with ChatServer(never) as server:
        assert claver_k400.main([*command, "--base-url", server.url]) == 1
    printed = capsys.readouterr()
    assert f"{CLASSES[2]}: given up after 2 replies" in printed.err
    assert "5 classes made, 0 found there, 1 failed" in printed.out
    seeds = {request["seed"] for request in server.requests}
    with ChatServer(port=server.server.server_port) as server:
        assert claver_k400.main([*command, "--base-url", server.url]) == 0
    assert server.requests[0]["seed"] not in seeds  # those would bring the same replies
    assert server.names == [CLASSES[2]]
    assert list(load_prompts(out, CLASSES)) == CLASSES


def test_a_server_that_dies_in_the_middle_costs_nothing_that_was_made(tmp_path):
    out, numbers = tmp_path / "p.json", count()

    def dies(request):
        return good(request) if next(numbers) < 3 else fails(502)

    with ChatServer(dies) as server, pytest.raises(ModelError, match=r"no answer after 3 requests.*502(.|\n)*3 of 6"):
        make(server, out, concurrency=1, patience=2)
    assert len(server.requests) == 3 + 3
    before = read_prompt_file(out)
    assert list(before.entries) == CLASSES[:3]
    with pytest.raises(ModelError, match=r"no connection(.|\n)*3 of 6"):  # it is gone
        make(server, out, patience=1)
    with ChatServer(port=server.server.server_port) as server:
        made = make(server, out)
    assert (made.made, made.found) == (3, 3)
    assert sorted(server.names) == sorted(CLASSES[3:])
    assert read_prompt_file(out).header["made"]["usage"]["requests"] == 6
    text = out.read_text().replace("}", " }")
    out.write_text(text)
    with ChatServer(port=server.server.server_port) as server:
        assert make(server, out).made == 0
    assert server.requests == []
    assert out.read_text() == text  # nothing is missing, nothing is written


def test_a_killed_run_goes_on_where_it_stopped(tmp_path):
    names = [f"motion number {i} of {made_up_sentence('class', 'name', i, 1)[:-1]}" for i in range(40)]
    (tmp_path / "names.txt").write_text("\n".join(names))
    out = tmp_path / "p.json"
    command = [
        sys.executable,
        str(COMMAND),
        "prompts",
        "make",
        "--classes",
        str(tmp_path / "names.txt"),
        "--out",
        str(out),
    ]
    with ChatServer(seconds=0.05) as server:
        process = subprocess.Popen(
            [*command, "--model", "small-model", "--base-url", server.url, "--concurrency", "3"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        while len(server.requests) < 12 and process.poll() is None:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        done = list(read_prompt_file(out).entries)
        assert 0 < len(done) < len(names)
        asked_before = len(server.requests)
        make(server, out, names, concurrency=3)
        assert sorted(server.names[asked_before:]) == sorted(set(names) - set(done))
    assert load_prompts(out, names) == {name: entry_for(name) for name in names}
    assert [path.name for path in tmp_path.glob("p.json*") if path.suffix != ".partial"] == ["p.json"]


def test_a_file_of_other_settings_or_of_other_hands_is_not_touched(tmp_path):
    out = tmp_path / "p.json"
    with ChatServer() as server:
        make(server, out)
        before = out.read_bytes()
        with pytest.raises(
            ValueError, match=r"other settings \(temperature = 0.9 there, 0.5 here; seed = 0 there, 1 here\)"
        ):
            make(server, out, temperature=0.5, seed=1)
        with ChatServer() as other, pytest.raises(ValueError, match=r"other settings \(endpoint = "):
            make(other, out)
        with pytest.raises(ValueError, match="has the class 'juggling eggs', which is not in the list"):
            make(server, out, CLASSES[1:])
        assert out.read_bytes() == before
        out.write_text(json.dumps({name: entry_for(name) for name in CLASSES}))
        with pytest.raises(ValueError, match="was not made by this command"):
            make(server, out)


def test_what_people_wrote_into_the_header_stays(tmp_path):
    out = tmp_path / "p.json"
    with ChatServer() as server:
        make(server, out, CLASSES[:2])
        file = read_prompt_file(out)
        ours = {"about": "Read by us.", "licence": "CC0-1.0", "version": "2", "dataset": "ours"}
        write_prompt_file(out, file.header | ours, file.entries)
        make(server, out)
    header = read_prompt_file(out).header
    assert {key: header[key] for key in ours} == ours
    assert header["made"]["usage"]["requests"] == len(CLASSES)


def test_a_file_that_cannot_be_written_leaves_nothing_behind(tmp_path):
    with pytest.raises(UnicodeEncodeError):
        write_prompt_file(tmp_path / "p.json", {}, {"a": "\ud83d"})
    assert list(tmp_path.iterdir()) == []


def test_what_an_endpoint_does_not_know_is_left_out(tmp_path):
    def old(request):
        unknown = [key for key in ("response_format", "max_tokens") if key in request]
        return fails(400, f"Unsupported parameter: {unknown[0]}") if unknown else good(request)

    with ChatServer(old) as server:
        assert make(server, tmp_path / "p.json", concurrency=1).failed == {}
    assert len(server.requests) == len(CLASSES) + 2
    assert server.requests[-1]["max_completion_tokens"] == 2048
    assert read_prompt_file(tmp_path / "p.json").header["made"]["left_out"] == ["max_tokens", "response_format"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kinds": ("smell",)}, "kinds must be some of"),
        ({"kinds": ()}, "kinds must be some of"),
        ({"patience": 0}, "patience must be at least 1"),
        ({"per_kind": 0}, "per_kind must be at least 1"),
        ({"top_p": 0.0}, "top-p above 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        MakerSettings(**settings)
