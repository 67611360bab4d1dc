"""`splitnet run` against real nodes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from small_models import Split

from splitnet.array_files import read_array, to_json, write_arrays
from splitnet.cli import run_command
from splitnet.commands.run import run
from splitnet.errors import BadInput
from splitnet.tensors import DTYPES, TensorSpec


@pytest.fixture
def chain_plan(chain: Split, tmp_path: Path) -> str:
    chain.plan.save(tmp_path / "chain.json")
    return str(tmp_path / "chain.json")


@pytest.fixture
def diamond_plan(diamond: Split, tmp_path: Path) -> str:
    diamond.plan.save(tmp_path / "diamond.json")
    return str(tmp_path / "diamond.json")


class Ended(NamedTuple):
    status: int
    out: str
    err: str


@pytest.fixture
def splitnet_run(capsys: pytest.CaptureFixture[str]) -> Any:
    def call(*arguments: str | Path) -> Ended:
        status = run_command(run, [str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Ended(status, captured.out, captured.err)

    return call


def test_a_npy_file_for_the_only_input(splitnet_run: Any, chain: Split, chain_plan: str, tmp_path: Path) -> None:
    inputs = chain.inputs(2)
    np.save(tmp_path / "x.npy", inputs["x"])
    ended = splitnet_run(chain_plan, tmp_path / "x.npy")
    assert (ended.status, ended.err) == (0, "")
    head, line = ended.out.splitlines()
    assert head == str(tmp_path / "x.npy")
    first = f"{chain.whole(inputs)['output'][0, 0]:.6g}"
    assert line.startswith(f"  output  float32 2x16  {first} ")
    assert line.endswith(" ...")


def test_several_files_in_order_as_json(splitnet_run: Any, diamond: Split, diamond_plan: str, tmp_path: Path) -> None:
    paths = []
    for seed in range(5):
        paths.append(tmp_path / f"in{seed}.npz")
        np.savez(paths[-1], **diamond.inputs(1 + seed, seed))
    ended = splitnet_run(diamond_plan, *paths, "--json")
    assert ended.status == 0
    answers = [json.loads(line) for line in ended.out.splitlines()]
    assert [answer["input"] for answer in answers] == [str(path) for path in paths]
    for seed, answer in enumerate(answers):
        for name, array in diamond.whole(diamond.inputs(1 + seed, seed)).items():
            assert answer["outputs"][name] == {"dtype": "float32", "shape": list(array.shape), "data": array.tolist()}


def test_named_files_make_a_request_until_a_name_comes_again(splitnet_run: Any, diamond: Split, diamond_plan: str, tmp_path: Path) -> None:
    arguments = []
    for seed in (1, 2):
        for name, array in diamond.inputs(2, seed).items():
            np.save(tmp_path / f"{name}{seed}.npy", array)
            arguments.append(f"{name}={tmp_path / f'{name}{seed}.npy'}")
    ended = splitnet_run(diamond_plan, *arguments, "--output", tmp_path / "answers" / "here", "--window", "1")
    assert ended.status == 0, ended.err
    for seed in (1, 2):
        with np.load(tmp_path / "answers" / "here" / f"x{seed}.npz") as written:
            for name, array in diamond.whole(diamond.inputs(2, seed)).items():
                np.testing.assert_array_equal(written[name], array)
    assert f"y={tmp_path / 'y2.npy'} -> {tmp_path / 'answers' / 'here' / 'x2.npz'}" in ended.out


def test_files_of_one_name_do_not_overwrite_each_other(splitnet_run: Any, chain: Split, chain_plan: str, tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        np.save(tmp_path / folder / "x.npy", chain.inputs(1)["x"])
    ended = splitnet_run(chain_plan, tmp_path / "one/x.npy", tmp_path / "two/x.npy", "--output", tmp_path / "out")
    assert ended.status == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["x-2.npz", "x.npz"]


def test_json_input(splitnet_run: Any, chain: Split, chain_plan: str, tmp_path: Path) -> None:
    for name, document in (("object.json", {"x": [[1] * 16]}), ("list.json", [[1.0] * 16])):
        (tmp_path / name).write_text(json.dumps(document))
        ended = splitnet_run(chain_plan, tmp_path / name, "--json")
        assert ended.status == 0, ended.err
        answer = json.loads(ended.out)["outputs"]["output"]["data"]
        np.testing.assert_array_equal(np.array(answer, np.float32), chain.whole({"x": np.ones((1, 16), np.float32)})["output"])


def test_what_the_user_gets_wrong(splitnet_run: Any, chain: Split, chain_plan: str, diamond_plan: str, tmp_path: Path) -> None:
    x = chain.inputs(2)["x"]
    np.save(tmp_path / "good.npy", x)
    np.save(tmp_path / "double.npy", x.astype(np.float64))
    np.save(tmp_path / "wide.npy", np.ones((2, 17), np.float32))
    np.save(tmp_path / "objects.npy", np.array([{}]), allow_pickle=True)
    np.savez(tmp_path / "objects.npz", x=np.array([{}]))
    np.savez(tmp_path / "named.npz", z=x)
    (tmp_path / "text.npy").write_text("hello")
    (tmp_path / "bad.npz").write_bytes((tmp_path / "named.npz").read_bytes()[:-30])
    (tmp_path / "zip.npy").write_bytes((tmp_path / "named.npz").read_bytes())
    (tmp_path / "words.json").write_text('["a"]')
    (tmp_path / "broken.json").write_text("[1,")
    (tmp_path / "x.txt").write_text("1")
    for arguments, message in (
        (["missing.npy"], "no file"),
        ([tmp_path / "double.npy"], "input 'x': expected float32, got float64"),
        ([tmp_path / "wide.npy"], "dimension 1 must be 16, got 17"),
        ([tmp_path / "objects.npy"], "objects.npy: "),
        ([tmp_path / "objects.npz"], "objects.npz: "),
        ([tmp_path / "named.npz"], "no input 'z'; the model has x"),
        ([tmp_path / "text.npy"], "text.npy: "),
        ([tmp_path / "bad.npz"], "bad.npz: "),
        ([tmp_path / "zip.npy"], "this is a .npz file with another name"),
        ([tmp_path / "words.json"], "expected numbers"),
        ([tmp_path / "broken.json"], "not JSON"),
        ([tmp_path / "x.txt"], "expected a file that ends in .npz, .npy or .json"),
        ([f"z={tmp_path / 'good.npy'}"], "no input 'z'"),
        ([tmp_path / "good.npy", "--output", tmp_path / "x.txt"], "x.txt"),
        ([tmp_path / "good.npy", "--timeout", "0"], "--timeout"),
        ([tmp_path / "good.npy", "--deployment", "other"], "no deployment 'other'"),
        ([], "INPUT"),
    ):
        ended = splitnet_run(chain_plan, *arguments)
        assert ended.status == 2, (arguments, ended)
        assert message in ended.err
        assert "Traceback" not in ended.err
        assert not ended.out
    ended = splitnet_run(diamond_plan, tmp_path / "good.npy")
    assert ended.status == 2
    assert "the model has 2 inputs: x, y" in ended.err
    ended = splitnet_run(chain_plan, tmp_path / "good.npy", tmp_path / "wide.npy", tmp_path / "good.npy")
    assert ended.status == 2
    assert ended.out.startswith(str(tmp_path / "good.npy")), "what came before is printed"
    assert f"{tmp_path / 'wide.npy'}: batch 1: input 'x'" in ended.err


def test_a_plan_that_is_not_there_or_not_deployed(splitnet_run: Any, chain: Split, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", chain.inputs(1)["x"])
    ended = splitnet_run(tmp_path / "plan.json", tmp_path / "x.npy")
    assert ended.status == 2
    assert "cannot read the plan" in ended.err
    dataclasses.replace(chain.plan, max_in_flight=5).save(tmp_path / "other.json")
    ended = splitnet_run(tmp_path / "other.json", tmp_path / "x.npy")
    assert ended.status == 2
    assert "this plan is not deployed at" in ended.err
    assert "'chain'" in ended.err
    assert "splitnet deploy" in ended.err
    assert splitnet_run(tmp_path / "other.json", tmp_path / "x.npy", "--deployment", "chain").status == 0


def test_the_node_is_gone(splitnet_run: Any, chain: Split, tmp_path: Path) -> None:
    gone = dataclasses.replace(
        chain.plan, nodes=tuple(dataclasses.replace(node, address=f"127.0.0.1:{9 + i}") for i, node in enumerate(chain.plan.nodes))
    )
    gone.save(tmp_path / "gone.json")
    np.save(tmp_path / "x.npy", chain.inputs(1)["x"])
    ended = splitnet_run(tmp_path / "gone.json", tmp_path / "x.npy")
    assert ended.status == 1
    assert "no node answers at 127.0.0.1:9" in ended.err
    assert "remedy" in ended.err


# -------------------------------------------------------------------------------------------------------------- arrays in files


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_every_dtype_is_written_and_read(dtype: str, tmp_path: Path) -> None:
    array = np.array([[0, 1], [1, 0]]).astype(DTYPES[dtype])
    write_arrays(tmp_path / "a.npz", {"file": array})
    with np.load(tmp_path / "a.npz", allow_pickle=False) as written:
        np.testing.assert_array_equal(written["file"], array.astype(np.float32) if dtype == "bfloat16" else array)
    np.save(tmp_path / "a.npy", array)
    back = read_array(tmp_path / "a.npy", TensorSpec("x", dtype, (2, 2)))
    assert back.dtype == array.dtype
    assert back.tobytes() == array.tobytes()
    json.dumps(to_json(array), allow_nan=False)


@pytest.mark.parametrize(
    ("text", "dtype", "message"),
    [
        ("[1.5]", "int64", "expected int64, got float64"),
        ("[300]", "uint8", "300"),
        ("[[1], [1, 2]]", "float32", "inhomogeneous"),
        ("[true]", "float32", "expected float32, got bool"),
        ("[1]", "bool", "expected bool, got int64"),
        ("[null]", "float32", "expected numbers"),
        ('{"a": 1}', "float32", "expected numbers"),
    ],
)
def test_json_is_not_bent_into_shape(text: str, dtype: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(BadInput, match=message) as caught:
        read_array(tmp_path / "x.json", TensorSpec("x", dtype, ("n",)))
    assert "x.json" in caught.value.message


def test_what_is_not_a_number_stays_visible() -> None:
    assert to_json(np.array([np.nan, np.inf, 1], np.float32))["data"] == ["nan", "inf", 1.0]
    described = to_json(np.array([np.nan, *range(9999)], np.float32))
    assert described["statistics"] == {"min": 0.0, "max": 9998.0, "mean": 4999.0, "not_finite": 1}
    assert to_json(np.full(5000, np.nan, np.float32))["statistics"] == {"not_finite": 5000}
    assert to_json(np.array([1 + 2j], np.complex64))["data"] == [[1.0, 2.0]]
