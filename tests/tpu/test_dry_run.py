"""The dry run without its compiler: slices, what the compiler says, the program it is given."""

import math
import re
import sys
from dataclasses import replace

import numpy as np
import pytest
import tensorflow as tf
from tensorflow.compiler.xla import xla_data_pb2
from tensorflow.compiler.xla.service import hlo_pb2

import train_tfrecords
from algpt2.configuration_algpt2 import ALGPT2Config
from algpt2.errors import UserError
from algpt2.kernels_tf_algpt2 import LOSS_ROWS, dropout
from algpt2.options import ModelOptions, OptimOptions, TFTrainOptions
from algpt2.runs.start import Start
from algpt2.tpu import dry_run
from algpt2.tpu.dry_run import GIB, Compiled, DryRun, TooLarge, parse_slice, read_answer
from algpt2.tpu.dry_run_tf import StepProgram
from algpt2.tpu.tpu_compiler import cycles_by_kind
from algpt2.training.optimizers_tf import build_optimizer
from algpt2.training.trainer_tf import build_model, build_step, step_seed

CORES_OF_A_CHIP = {"v2": 2, "v3": 2}  # of those that run a replica


# --- slices --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "gcloud", "topology", "n_cores", "hbm_gib", "chip_config"),
    [
        ("v2-8", "v2-8", "v2:2x2", 8, 8, ""),
        ("v3-128", "v3-128", "v3:8x8", 128, 16, ""),
        ("v4-8", "v4-8", "v4:2x2x1", 4, 32, "megacore"),
        ("v5e-16", "v5litepod-16", "v5e:4x4", 16, 16, ""),
        ("v5litepod-256", "v5litepod-256", "v5e:16x16", 256, 16, ""),
        ("v5p-8", "v5p-8", "v5p:2x2x1", 4, 95, ""),
        ("v6e-8", "v6e-8", "v6e:2x4", 8, 32, ""),
    ],
)
def test_a_slice_of_every_generation(name, gcloud, topology, n_cores, hbm_gib, chip_config):
    found = parse_slice(name)
    assert (found.name, found.topology, found.n_cores) == (gcloud, topology, n_cores)
    assert (found.hbm_gib, found.chip_config) == (hbm_gib, chip_config)


def test_every_slice_has_as_many_cores_as_its_topology():
    for generation in dry_run._GENERATIONS:
        with pytest.raises(UserError) as error:
            parse_slice(f"{generation}-3")
        names = re.findall(rf"{generation}-\d+", str(error.value).partition("expected")[2])
        assert len(names) > 5
        for name in names:
            tpu = parse_slice(name)
            chips = math.prod(map(int, tpu.topology.partition(":")[2].split("x")))
            assert tpu.n_cores == chips * CORES_OF_A_CHIP.get(generation, 1)


@pytest.mark.parametrize("name", ["", "v3", "v7-8", "128", "gpu-8", "v5litepod"])
def test_a_wrong_slice_name_is_a_user_error(name):
    with pytest.raises(UserError, match=r"expected (a TPU slice such as v2-8|one of v\w+-\d+)"):
        parse_slice(name)


# --- before TensorFlow is built up ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dry_run=v3-127"], "--dry_run v3-127: no such size; expected one of v3-8, v3-32"),
        (["--dry_run=v9-8"], r"--dry_run v9-8: expected a TPU slice.*v2, v3, v4, v5e, v5p, v6e"),
        (["--dry_run=v3-128", "--batch_size=500"], "--batch_size 500.*multiple of the 128 of v3"),
        (["--dry_run=v3-128", "--batch_size=512"], "needs libtpu.*requirements-dry-run.txt"),
        (["--find_batch"], "^--find_batch needs --dry_run SLICE"),
    ],
)
def test_what_is_wrong_is_said_at_once(monkeypatch, flags, message):
    monkeypatch.setattr(dry_run.importlib.util, "find_spec", {"jax": "here"}.get)
    monkeypatch.setitem(sys.modules, "algpt2.tpu.dry_run_tf", None)  # importing it would fail
    with pytest.raises(UserError, match=message):
        train_tfrecords.main(["--config_path=algpt2", *flags])


def test_rows_that_do_not_fit_the_model_are_refused(monkeypatch):
    monkeypatch.setattr(dry_run, "check_requirements", lambda: None)
    with pytest.raises(UserError, match="rows of 2048 tokens do not fit the model's 1024 pos"):
        train_tfrecords.main(["--config_path=gpt2", "--dry_run=v3-8", "--seq_len=2048"])


# --- what the compiler says ----------------------------------------------------------------------

ANSWER = {
    "argument_bytes": 3 * GIB, "temp_bytes": 2 * GIB, "output_bytes": 3 * GIB,
    "alias_bytes": 2 * GIB, "code_bytes": GIB, "flops": 1.1e12, "seconds": 2.0,
}  # fmt: skip


# Of libtpu 0.0.52, shortened: a fusion with a product, a loop, both branches of a condition.
OPTIMIZED = """HloModule step, is_scheduled=true

%fused_product (p: bf16[8,8]) -> bf16[8,8] {
  %p = bf16[8,8] parameter(0)
  ROOT %c = bf16[8,8] convolution(%p, %p), dim_labels=bf_io->bf
}

%fused_mask (p: bf16[8,8]) -> bf16[8,8] {
  ROOT %p = bf16[8,8] parameter(0)
}

%body (p: bf16[8,8]) -> bf16[8,8] {
  %a = bf16[8,8] fusion(%p), kind=kOutput, calls=%fused_product, metadata={op_name="h.0.attn/MatMul"}, backend_config={"window_config":{"estimated_cycles":"100"}}
  ROOT %b = bf16[8,8] fusion(%a), kind=kLoop, calls=%fused_mask, metadata={op_name="h.0.attn/stateless_dropout"}, backend_config={"window_config":{"estimated_cycles":"20"}}
}

%update (p: bf16[8,8]) -> bf16[8,8] {
  ROOT %a = bf16[8,8] copy(%p), metadata={op_name="cond/Assign"}, backend_config={"window_config":{"estimated_cycles":"7"}}
}

%keep (p: bf16[8,8]) -> bf16[8,8] {
  ROOT %p = bf16[8,8] parameter(0)
}

ENTRY %main (p: bf16[8,8], ok: pred[]) -> bf16[8,8] {
  %p = bf16[8,8] parameter(0)
  %w = bf16[8,8] while(%p), condition=%keep, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %s = bf16[8,8] fusion(%w), kind=kLoop, calls=%fused_mask, metadata={op_name="h.0.attn/Softmax"}, backend_config={"window_config":{"estimated_cycles":"5"}}
  ROOT %u = bf16[8,8] conditional(%ok, %s, %s), true_computation=%update, false_computation=%keep
}
"""  # noqa: E501


def test_the_compilers_cycles_are_summed_by_kind_through_loops_and_conditions():
    expected = {"matrix products": 300, "dropout": 60, "optimizer": 7, "attention": 5}
    assert list(cycles_by_kind(OPTIMIZED).items()) == list(expected.items())
    assert cycles_by_kind(OPTIMIZED.replace("known_trip_count", "unknown")) == {}


def test_the_time_of_a_step_is_the_compilers_estimate():
    cycles = {"matrix products": 658_000_000, "dropout": 188_000_000, "MLP": 94_000_000}
    trial = DryRun(
        parse_slice("v3-128"),
        None,
        1024,
        10**9,
        grad_steps=2,
        steps=lambda size: 3600 * 512 // size,
    )
    said = "\n".join(trial.describe_time(4, cycles))
    assert "1.000 s at 940 MHz, 1,048,576 tokens/s, 1.00 hours for 3,600 steps" in said
    assert "the compiler's estimate, not measured" in said
    assert re.search(r"matrix products +0.7000 s +70%\n +dropout +0.2000 s +20%", said)
    assert said.endswith("largest but for matrix products: dropout, 20% of the step")
    [unknown] = replace(trial, tpu=parse_slice("v6e-8")).describe_time(4, cycles)
    assert "no estimate" in unknown


def test_outputs_that_take_the_place_of_arguments_are_counted_once():
    assert read_answer(ANSWER).total_bytes == (3 + 2 + (3 - 2) + 1) * GIB


@pytest.mark.parametrize(
    ("message", "needed", "available"),
    [
        (  # libtpu 0.0.52
            "JaxRuntimeError: RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on "
            "HBM, the total memory required for HLO temporaries (29.77G) exceeds available HBM "
            "(15.48G). HLO module: a_inference_replica_step_11147__.493.\nSee https://openxla.org/"
            "xla/errors/error_1000 for more details.",
            "29.77 GiB", "15.48 GiB",
        ),
        ("RESOURCE_EXHAUSTED: Used 20.13G of 15.48G hbm.", "20.13 GiB", "15.48 GiB"),
        ("RESOURCE_EXHAUSTED: something new", "", ""),
    ],
)  # fmt: skip
def test_a_program_that_is_too_large_is_recognized(message, needed, available):
    found = read_answer({"error": message})
    assert found == TooLarge(needed, available)
    assert (f"{needed} of HBM, a core has {available}" if needed else "more HBM") in str(found)


def test_an_error_other_than_memory_is_a_user_error():
    with pytest.raises(UserError, match="refuses the program: ValueError: unknown topology"):
        read_answer({"error": "ValueError: unknown topology"})


def test_a_compiler_that_dies_is_a_user_error(monkeypatch):
    monkeypatch.setattr(sys, "executable", "false")
    with pytest.raises(UserError, match=r"ended with code 1 and no answer \(no message\)"):
        dry_run.compile_program(b"", parse_slice("v3-8"))


def test_the_compilers_process_answers_whatever_happens_to_it(monkeypatch, tmp_path):
    """Without jax, as here: the error crosses over whole."""
    (tmp_path / "jax.py").write_text("raise ImportError('no jax of this name')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(UserError, match=r"refuses the program: .*Error: .*jax"):
        dry_run.compile_program(b"", parse_slice("v3-8"))


# --- the largest batch ---------------------------------------------------------------------------


class Memory:
    """A compiler whose programs take `bytes_of(rows)`, and their name says how many rows."""

    def __init__(self, bytes_of):
        self.bytes_of, self.asked = bytes_of, []

    def lower(self, rows):
        self.asked.append(rows)
        return b"%d" % rows

    def __call__(self, program, tpu):
        n_bytes = int(self.bytes_of(int(program)))
        if n_bytes > 2 * tpu.hbm_gib * GIB:  # what XLA itself refuses
            return TooLarge("99 GiB", "15 GiB")
        return Compiled(0, n_bytes, 0, 0, 0, 1.05e9 * int(program), 1.0)

    def find(self, name="v3-8"):
        trial = DryRun(parse_slice(name), self, 1024, 10**9, self)
        return trial.find_batch()[0]


@pytest.mark.parametrize("per_row", [0.001, 0.07, 0.3, 0.8, 1.9, 7.0, 15.0])
@pytest.mark.parametrize("shape", [1.0, 0.8, 1.2])
def test_the_largest_batch_is_found_to_an_eighth(per_row, shape):
    def bytes_of(rows):
        return (0.5 + per_row * rows**shape) * GIB

    compiler = Memory(bytes_of)
    found = compiler.find()
    largest = max(n for n in range(1, dry_run.MAX_ROWS + 1) if bytes_of(n) <= 16 * GIB)
    assert largest - found < max(1, largest // 8)
    assert found <= largest
    assert len(compiler.asked) == len({*compiler.asked}) <= 9
    if shape == 1:
        assert len(compiler.asked) <= 4


def test_a_compiler_that_recomputes_near_its_limit_is_not_asked_for_more_often():
    """As gpt2 on v3-128: 20 rows took less than 18, as XLA began to recompute activations."""
    compiler = Memory(lambda rows: 99 * GIB if rows > 21 else (1 + rows * 0.8 - (rows > 18)) * GIB)
    assert compiler.find() in (20, 21)
    assert len(compiler.asked) <= 6


def test_one_row_that_does_not_fit_is_one_sentence(capsys):
    compiler = Memory(lambda rows: 20 * GIB)
    with pytest.raises(UserError, match=r"1 rows? per core .* not fit v3-8.*20.00 GiB of HBM"):
        compiler.find()
    assert compiler.asked == [1]
    assert Memory(lambda rows: (10 + rows * 10) * GIB).find("v4-8") == 2


def test_a_batch_is_described_or_refused_with_what_to_do(capsys):
    compiler = Memory(lambda rows: rows * GIB)
    trial = DryRun(parse_slice("v3-128"), compiler, 1024, 10**9, compiler)
    trial.check(4)
    printed = capsys.readouterr().out
    assert "128 cores (v3:8x8), 4 rows of 1,024 tokens per core, --batch_size 512" in printed
    assert re.search(r"HBM total +4\.000 GiB of 16 GiB \(25%\)", printed)
    assert "ratio 1.050" in printed
    with pytest.raises(UserError, match=r"20 rows per core do not fit v3-128.*--grad_steps"):
        trial.check(20)
    with pytest.raises(UserError, match="the step needs 99 GiB of HBM, a core has 15 GiB for it"):
        trial.check(40)


# --- the program ---------------------------------------------------------------------------------


@pytest.fixture
def options(tmp_path):
    """A run of a tiny model of three layers that share two blocks."""
    ALGPT2Config(
        vocab_size=300, n_positions=16, n_embd=32, n_layer=3, n_head=2, embedding_size=16,
        num_hidden_groups=2, layer_map=[0, 1, 1], bos_token_id=299, eos_token_id=299,
        attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
    ).save_pretrained(tmp_path / "config")  # fmt: skip
    optim = OptimOptions(optimizer="Adafactor", precision="fp32", batch_size=4)
    return TFTrainOptions(model=ModelOptions(config=str(tmp_path / "config")), optim=optim)


def matrix_flops(program):
    """FLOPs of the matrix products of a module; the body of a loop counted once, as XLA does."""
    module = hlo_pb2.HloModuleProto.FromString(program)
    computations = {computation.id: computation for computation in module.computations}

    def count(computation):
        total, shapes = 0, {one.id: one.shape.dimensions for one in computation.instructions}
        for one in computation.instructions:
            if one.opcode == "dot":
                contracted = one.dot_dimension_numbers.lhs_contracting_dimensions
                sizes = [shapes[one.operand_ids[0]][d] for d in contracted]
                total += 2 * math.prod(one.shape.dimensions) * math.prod(sizes)
            total += sum(count(computations[called]) for called in one.called_computation_ids)
        return total

    return count(computations[module.entry_computation_id])


@pytest.mark.parametrize("changes", [{}, {"grad_steps": 3}, {"precision": "auto"}])
def test_the_programs_matrix_products_are_the_closed_form(options, changes):
    optim = replace(options.optim, **changes)
    program = StepProgram(replace(options, optim=optim), 16, 128)
    assert program.model.compute_dtype == ("bfloat16" if "precision" in changes else "float32")
    assert program.model.loss_rows == LOSS_ROWS
    for rows in (1, 4):
        expected = program.model.config.flops_per_token(16) * 16 * rows
        assert matrix_flops(program.lower(rows)) == expected


def test_gradient_checkpointing_recomputes_one_forward_pass_of_the_blocks(options):
    model = replace(options.model, gradient_checkpointing=True)
    program = StepProgram(replace(options, model=model), 16, 128)
    config = program.model.config
    again = 2 * config.n_layer * (12 * config.n_embd**2 + 2 * config.n_embd * 16)
    assert matrix_flops(program.lower(2)) == 2 * 16 * (config.flops_per_token(16) + again)


def test_gradients_are_reduced_over_the_cores_of_the_slice(options):
    program = StepProgram(options, 16, 32)
    module = hlo_pb2.HloModuleProto.FromString(program.lower(2))
    reduces = [
        one for c in module.computations for one in c.instructions if one.opcode == "all-reduce"
    ]
    assert len(reduces) == 1 + len(program.model.trainable_variables)  # the loss, each gradient
    for one in reduces:
        groups = one.collective_device_list.replica_groups or one.replica_groups
        assert [[*group.replica_ids] for group in groups] == [[*range(32)]]


def generators(graph):
    """The `alg` of every operation of a traced function that draws random numbers."""
    graph_def = graph.as_graph_def()
    found = []
    for nodes in (graph_def.node, *(one.node_def for one in graph_def.library.function)):
        by_name = {node.name: node for node in nodes}
        for node in nodes:
            if node.op.startswith("StatelessRandomUniform"):
                constant = by_name[node.input[3].partition(":")[0]]
                found.append(
                    tf.random.Algorithm(int(tf.make_ndarray(constant.attr["value"].tensor)))
                )
    return {*found}


@pytest.mark.parametrize("grad_steps", [1, 3])
def test_dropout_draws_with_the_generator_of_the_tpu(options, grad_steps):
    """`philox` is expanded on a v3 into 12 times the step; on CPUs and GPUs it stays."""
    optim = replace(options.optim, grad_steps=grad_steps)
    config = ALGPT2Config.from_pretrained(options.model.config)
    config.attn_pdrop = config.embd_pdrop = config.resid_pdrop = 0.1
    config.save_pretrained(options.model.config)
    program = StepProgram(replace(options, optim=optim), 16, 128)
    traced = program._step.get_concrete_function(*program.specs(2))
    assert generators(traced.graph) == {tf.random.Algorithm.AUTO_SELECT}
    module = hlo_pb2.HloModuleProto.FromString(program.lower(2))
    drawn = [
        one for c in module.computations for one in c.instructions if one.opcode.startswith("rng")
    ]
    assert len(drawn) > 1 + 3 * program.model.config.n_layer  # and those that fold seeds
    assert {one.rng_algorithm for one in drawn} == {xla_data_pb2.RNG_DEFAULT}

    seed = tf.TensorSpec([2], tf.int32)
    plain = tf.function(lambda x, seed: dropout(x, 0.1, seed, 0)).get_concrete_function(
        tf.TensorSpec([8]), seed
    )
    assert tf.random.Algorithm.PHILOX in generators(plain.graph)


@pytest.mark.numeric
@pytest.mark.parametrize("grad_steps", [1, 3])
def test_the_program_is_the_training_step(options, grad_steps):
    """With one core it runs here: the same loss, norm and weights as the step that trains."""
    optim = replace(options.optim, grad_steps=grad_steps, optimizer="SGD")
    rows = np.random.default_rng(0).integers(0, 300, (grad_steps, 4, 17)).astype(np.int32)
    arguments = [tf.constant(x) for x in (rows, np.float32(1), step_seed(1, 0), True)]
    program = StepProgram(replace(options, optim=optim), 16, 1)
    model = build_model(Start.find(options.model))
    step = tf.function(build_step(model, build_optimizer(model, optim, 1e-3), optim))
    before = model.transformer.wte.weight.numpy()
    for _ in range(2):
        found, expected = program._step(*arguments), step(*arguments)
        assert [x.numpy() for x in found] == pytest.approx([x.numpy() for x in expected], rel=1e-5)
    for a, b in zip(program.model.trainable_variables, model.trainable_variables, strict=True):
        np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=1e-4, atol=1e-5)
    assert np.abs(model.transformer.wte.weight.numpy() - before).max() > 1e-3
