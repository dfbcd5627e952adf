"""The sections of docs/benchmarks.md: which results each one shows, and how. Numbers come from the results."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]

DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
NAMES = {
    "llama-3.2-1b": "Llama-3.2-1B",
    "llama-2-7b": "Llama-2-7B",
    "llama-3-8b": "Llama-3-8B",
    "opt-6.7b": "OPT-6.7B",
}


class Result(dict[str, Any]):
    """What a benchmark wrote: ``provenance`` and ``results``."""

    @property
    def rows(self) -> list[Row]:
        return self["results"]

    @property
    def conditions(self) -> str:
        """Command, machine and date in one paragraph."""
        p = self["provenance"]
        cpu = f"{p['cpu']} ({p['instructions']})" if "instructions" in p else p["cpu"]
        where = p["gpu"] or f"{cpu}, {p['cores']} cores, {p['threads']} threads"
        libraries = f"torch {p['torch'].split('+')[0]}, transformers {p['transformers']}"
        return f"`{p['command']}`  \n{where}; {libraries}; {p['date'][:10]}."


@dataclass(frozen=True)
class Section:
    """One heading of the page."""

    title: str
    results: tuple[str, ...]
    """File names in benchmarks/results; ``text`` gets them in this order."""
    text: Callable[..., str]
    level: int = 2

    @property
    def heading(self) -> str:
        return f"{'#' * self.level} {self.title}"


# ---- cells and tables


def times(ratio: float) -> str:
    """A speed-up."""
    return f"{ratio:.2f}×"


def percent(share: float) -> str:
    """A share, without decimals."""
    return f"{share * 100:.0f} %"


def span(values: Iterable[float]) -> str:
    """From the smallest to the largest, without decimals."""
    known = list(values)
    return f"{min(known):.0f} to {max(known):.0f}"


def paragraph(text: str) -> str:
    """Filled anew, for text with numbers in it."""
    return textwrap.fill(" ".join(text.split()), 120, break_long_words=False, break_on_hyphens=False)


def shape(row: Row) -> str:
    """Name and sizes of an MLP."""
    kind = "" if row["gated"] else " plain"
    return f"{NAMES.get(row['shape'], row['shape'])}, {row['hidden']} × {row['neurons']}{kind}"


def dtype(row: Row) -> str:
    return DTYPES[row["dtype"]]


def sparsity(row: Row) -> str:
    """The wanted share, of which ties between neurons leave a little."""
    return percent(round(row["sparsity"], 2))


def table(head: Sequence[str], lines: Iterable[Sequence[str]], left: int = 1) -> str:
    """Markdown with ``left`` columns of names, the others aligned right."""
    rule = ["---" if i < left else "---:" for i in range(len(head))]
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *lines))


def pivot(
    rows: Iterable[Row],
    index: dict[str, Callable[[Row], str]],
    column: Callable[[Row], str],
    cell: Callable[[Row], str],
) -> str:
    """One line per distinct ``index``, one column per distinct ``column``, in the order of the rows."""
    lines: dict[tuple[str, ...], dict[str, str]] = {}
    columns: dict[str, None] = {}
    for row in rows:
        columns.setdefault(column(row))
        lines.setdefault(tuple(name(row) for name in index.values()), {})[column(row)] = cell(row)
    body = [[*names, *(cells.get(c, "") for c in columns)] for names, cells in lines.items()]
    return table([*index, *columns], body, len(index))


MLP = {"shape": shape, "dtype": dtype}


# ---- the sections


def introduction() -> str:
    return """\
*Written by `python benchmarks/report.py` from [benchmarks/results](../benchmarks/results); change the results or
[report_sections.py](../benchmarks/report_sections.py), not this page.*

Skipping silent neurons is compared with **dense PyTorch in the same dtype** on stock weights, in the same process. Results
are checked before they are timed, competitors take turns, and calls cycle through more weights than a cache holds. Times are
medians, speed-ups the median of the ratios within one turn; the JSON files have quartiles, and the bytes read against a
streaming read of the same machine. The byte limit is what reading fewer weights can give if all else is equal: 2.5× at 90 %
in a gated MLP, 1.8× in a plain one; ratios above it say that dense is off its own limit.

**Against other programs.** The rival is what a user of transformers runs today. A CPU user will also think of llama.cpp,
which decodes without Python between the layers and quantises: [against llama.cpp](#against-llamacpp). All other sections
measure what sparsity is worth inside PyTorch, not how fast a CPU can decode.

**Machines.** All of it is from two-core virtual machines, whose memory is shared with others: its speed changed by more than
a factor of two between runs, so compare within a table and not between them. Where the line under a
heading names AVX2, bfloat16 is widened by instructions that take longer; where it names none, they were not recorded. No number here is from a GPU. The
Triton kernels are tested in Triton's interpreter and compile for sm_90; on GPUs `auto` stays dense until `hf_sparse.tune`
has measured that skipping is faster.

**Your machine:**

```console
$ python benchmarks/mlp_decode.py --plot       # one token; four shapes, 0 to 99 % sparsity
$ python benchmarks/mlp_batch.py --plot        # 1 to 512 tokens, independent and correlated
$ python benchmarks/mlp_certified.py --plot    # certified skip; --weights takes the weights of a model of yours
$ python benchmarks/linear.py                  # dense products of 1 to 8 tokens, against F.linear
$ python benchmarks/generate.py --certify      # generate() of a randomly initialised Llama-3.2-1B; --batch
$ python benchmarks/peers.py                   # the same against llama.cpp; --model takes one of yours
$ python benchmarks/experts.py                 # a layer of stacked experts
$ python benchmarks/trained_mlp.py             # a training step of an MLP with few active neurons
$ python benchmarks/lora.py                    # a gated MLP under a LoRA adapter
$ python benchmarks/loading.py                 # what a patch costs before the first token
$ python benchmarks/busy_neighbour.py          # decoding with and without another process on the cores
```

Each writes JSON with its conditions to `benchmarks/results/`; `--out FILE` keeps the committed results as they are. On a GPU
each competitor is one CUDA graph. Use an idle machine for all but the last: torch's own parallel regions, of stock and
patched models alike, wait for every thread, and with a busy neighbour each turns microseconds into ticks of the scheduler.
`--threads 1` is then the steadier measurement."""


_OPT = """\
The shape of OPT stands for plain MLPs that are modules of their own. In transformers' OPT itself only the down projection
skips, without a certificate."""


def decode(result: Result) -> str:
    rows = result.rows
    at_90 = [row for row in rows if sparsity(row) == "90 %"]
    bf16 = [row for row in rows if row["dtype"] == "bfloat16"]

    def from_to(row: Row) -> str:
        return f"{row['dense']['median_ms']:.2f} → {row['sparse']['median_ms']:.2f} ms"

    reading = f"""
        What lies above the byte limit is not skipping but reading: while torch's linear layers in bfloat16 read memory
        at {span(row["dense_gb_per_s"] for row in bf16)} GB/s for one token, the kernel read at
        {span(row["gb_per_s"] for row in bf16)}, {percent(statistics.median(row["bandwidth_share"] for row in bf16))}
        (median) of what a plain streaming read reached in the same turns; the column 0 % shows that part alone. It
        depends on the machine. Memory gave {span(row["read_gb_per_s"] for row in rows)} GB/s during this run, so
        neighbouring cells compare only roughly. On 2026-11-21, when torch read faster, the first line was 2.98× at
        90 %."""
    return f"""\
{result.conditions} [All rows](../benchmarks/results/mlp_decode.json), [plot](../benchmarks/results/mlp_decode.png).

{pivot(rows, MLP, sparsity, lambda row: times(row["speedup"]))}

Dense → skipping at 90 %:

{pivot(at_90, {"shape": shape}, dtype, from_to)}

{_OPT}

{paragraph(reading)}"""


def certified(result: Result) -> str:
    by_case: dict[tuple[str, str, str], list[Row]] = {}
    for row in result.rows:
        by_case.setdefault((row["shape"], row["dtype"], sparsity(row)), []).append(row)
    pairs = [{**own, "plain": plain["speedup"]} for plain, own in by_case.values()]

    def cell(row: Row) -> str:
        return f"{times(row['plain'])} → {times(row['speedup'])}, {percent(row['surviving'])}"

    return f"""\
{result.conditions} [All rows](../benchmarks/results/mlp_certified.json), [plot](../benchmarks/results/mlp_certified.png).

One token, uncertified → certified with bit-identical results, and the share of gate rows that the certificate leaves to
read (of a plain MLP, rows of the up projection). [kernels.md](kernels.md#certified-skip) says what a certificate is. {_OPT}

{pivot(pairs, MLP, sparsity, cell)}"""


def batch(result: Result) -> str:
    kinds = {"independent": "independent", "correlated 8:30": "correlated"}
    index = {**MLP, "tokens are": lambda row: kinds[row["inputs"]]}

    def cell(row: Row) -> str:
        return f"{times(row['speedup'])} ({row['union'] * 100:.0f}%)"

    return f"""\
{result.conditions} [All rows](../benchmarks/results/mlp_batch.json), [plot](../benchmarks/results/mlp_batch.png).

A decoding batch or a prompt, 90 % silent for each token, by the number of tokens in the call, with the union of active
neurons in brackets. Independent tokens share neurons only by chance; correlated ones, as trained models have them, are made
so that the union of 8 is 30 %.

{pivot(result.rows, index, lambda row: str(row["tokens"]), cell)}

In float32 torch is slow on this CPU, which is part of what those lines show. Many tokens are a matter of arithmetic, not of
reading: even where some token needs every neuron, the up and down projections of the pairs that are silent are not
computed."""


def dense(result: Result, shapes: Result, dtypes: Result) -> str:
    def by_tokens(rows: list[Row]) -> str:
        index = {**MLP, "sparsity": sparsity}
        return pivot(rows, index, lambda row: str(row["tokens"]), lambda row: times(row["speedup"]))

    lowest = min(row["speedup"] for one in (result, shapes, dtypes) for row in one.rows)
    return f"""\
As the operators choose by themselves (`auto`), against torch on stock weights, by the number of tokens in the call. With 8
and more independent tokens some token needs every neuron also at 50 %. The lowest of all these medians is {times(lowest)}.

{result.conditions} [All rows](../benchmarks/results/mlp_dense.json).

{by_tokens(result.rows)}

{shapes.conditions} [All rows](../benchmarks/results/mlp_dense_shapes.json).

{by_tokens(shapes.rows)}

{dtypes.conditions} [All rows](../benchmarks/results/mlp_dense_dtypes.json).

{by_tokens(dtypes.rows)}"""


def generate(result: Result) -> str:
    rows = {row["model"]: row for row in result.rows}
    first, stock = rows["patched, dense"], rows["stock SiLU"]
    lines = []
    for name, row in rows.items():
        over_stock = row["speedup"] / stock["speedup"]
        lines.append([name, f"{row['tokens_per_s']:.2f}", times(row["speedup"]), times(over_stock)])
    head = ["model", "tokens/s", "of patched, dense", "of stock"]
    sizes = f"{first['layers']} layers, {first['dtype']}, batch {first['batch']}"
    about = f"""
        A randomly initialised Llama-3.2-1B ({sizes}, {first["prompt_tokens"]} + {first["new_tokens"]} tokens) with
        FATReLU thresholds that silence {percent(first["sparsity"])} of the neurons. Attention and the head of 128,256
        tokens are as in any other model, and dense. Ratios are medians of those taken by turns."""
    return f"""\
{result.conditions} [All rows](../benchmarks/results/generate.json).

{paragraph(about)}

{table(head, lines)}

On 2026-11-21, when memory was faster: 9.3 tokens/s dense, 15.9 skipping, 1.71×."""


def busy(result: Result) -> str:
    loads = {
        "none": "the machine to itself",
        "bound": "a neighbour bound to one core",
        "free": "a neighbour that the scheduler may move",
    }
    rows = {(row["neighbour"], row["model"]): row for row in result.rows}
    lines = []
    for load, name in loads.items():
        stock, skipping = rows[load, "stock"], rows[load, "skipping"]
        speeds = [
            f"{row['tokens_per_s']:.1f} ({percent(row['kept']['median'])})" for row in (stock, skipping)
        ]
        lines.append([name, *speeds, times(skipping["against_stock"]["median"])])
    first = rows["none", "skipping"]
    about = f"""
        A small model, where threads meet most often: a Llama of {first["layers"]} layers of {first["hidden"]} × {first["neurons"]},
        {DTYPES[first["dtype"]]}, {first["weights"]} weights, {percent(first["sparsity"])} of the neurons silent, while
        {rows["bound", "skipping"]["neighbours"]} other process computes without a pause. Tokens per
        second, in brackets what is left of the undisturbed speed."""
    return f"""\
{result.conditions} [All rows](../benchmarks/results/busy_neighbour.json).

{paragraph(about)}

{table(["", "stock", "skipping", "skipping against stock"], lines)}"""


def experts(result: Result) -> str:
    lines = [
        [
            DTYPES[row["dtype"]],
            str(row["tokens"]),
            percent(row["sparsity"]),
            f"{row['dense_ms']['median_ms']:.1f} (`{row['dense']}`)",
            f"{row['skipping_ms']['median_ms']:.1f}",
            f"{times(row['speedup']['median'])} ({times(row['speedup']['low'])} to {times(row['speedup']['high'])})",
        ]
        for row in result.rows
    ]
    first = result.rows[0]
    about = f"""
        A layer of {first["experts"]} experts of {first["hidden"]} × {first["neurons"]}, of which each token goes to
        {first["top_k"]}, as in OLMoE; random weights. Dense is the fastest of transformers' implementations (in brackets) of
        the same function; skipping reads the up and down weights of active neurons of routed experts only. Milliseconds."""
    head = ["dtype", "tokens", "silent", "dense", "skipping", "skipping against dense (quartiles)"]
    return f"""\
{result.conditions} [All rows](../benchmarks/results/experts.json).

{paragraph(about)}

{table(head, lines)}"""


def lora(result: Result) -> str:
    places = {"merged": "none: merged", "gate": "gate", "up": "up", "down": "down"}
    index = {"adapter on": lambda row: places[row["adapter"]], "dtype": dtype}

    def cell(row: Row) -> str:
        ratio = row["speedup"]
        return f"{times(ratio['median'])} ({times(ratio['low'])} to {times(ratio['high'])})"

    first = result.rows[0]
    about = f"""
        One token through the gated MLP of {first["hidden"]} × {first["neurons"]}, with an adapter of rank {first["rank"]} of
        PEFT on one projection, by the share of silent neurons; dense is the stock block with the same activation and the
        same adapter. Medians and quartiles of the ratios within a turn. An adapter on gate or up is called, and leaves the
        down projection to skip: the byte limit is then {times(3 / 2.1)} at 90 %, and {times(3 / 1.2)} of the merged block.
        Under an adapter on the down projection the block runs dense."""
    load = result["provenance"]["load_before"]
    shared = ", so that other processes shared the cores" if load > 1 else ""
    return f"""\
{result.conditions} Load average before: {load}{shared}. [All rows](../benchmarks/results/lora.json).

{paragraph(about)}

{pivot(result.rows, index, sparsity, cell)}"""


def loading(result: Result) -> str:
    patch, dense, patched = result.rows

    def both(field: str) -> str:
        one, other = (row[field]["median_ms"] for row in (dense, patched))
        return f"{one:.0f} ms as it is and {other:.0f} ms patched ({(other / one - 1) * 100:+.1f} %)"

    about = f"""
        Loading {patched["model"]} takes {both("time")}, of the processor {both("processor_time")}; medians of
        {patched["time"]["repeats"]} turns. The difference is for finding its blocks, once; it grows with the number of
        layers, not with their size. Peak memory is {dense["peak_mib"]:.0f} and {patched["peak_mib"]:.0f} MiB. Patching a
        model of the shape of {NAMES[patch["shape"]]} takes {patch["time"]["median_ms"]:.0f} ms."""
    return f"""\
{result.conditions} [All rows](../benchmarks/results/loading.json).

{paragraph(about)}"""


PEERS = (
    "peers.json",
    "peers_smollm2.json",
    "peers_avx512.json",
    "peers_amx.json",
    "peers_smollm2_amx.json",
)


def peers(*results: Result) -> str:
    lines, conditions = [], []
    for result, name in zip(results, PEERS, strict=True):
        for row in result.rows:
            what = "random" if row["of"] == "random" else f"weights of {row['of']}"
            what += f", {row['new_tokens']} tokens"
            lines.append(
                [
                    result["provenance"]["instructions"],
                    f"{row['layers']} × {row['hidden']} × {row['neurons']}, {what}",
                    row["model"],
                    percent(row["sparsity"]),
                    f"{row['tokens_per_s']:.1f}",
                    times(row["to_llama_cpp"]),
                    times(row["to_stock"]),
                    f"{row['gb_per_s']:.1f}, {percent(row['bandwidth_share'])}",
                ]
            )
        version = result["provenance"]["llama_cpp"]
        link = f"[All rows](../benchmarks/results/{name})"
        conditions.append(f"{result.conditions[:-1]}; llama-cpp-python {version}. {link}.")
    first = results[0].rows[0]
    about = f"""
        Greedy decoding of one sequence, {DTYPES[first["dtype"]]} but for Q8_0 and int8, after a single token, the same weights in
        all programs. FATReLU with thresholds that silence the wanted share; *patched* is
        `hf_sparse.prepare(model, linears=False)`, *prepared* `hf_sparse.prepare(model)`,
        *certified* with `certify=True`, *output certified, too* with `greedy_output=True` as well, *compiled* with
        `compile=True`, *all certified* with all three, *int8* after torchao's `quantize_(model, Int8WeightOnlyConfig())`. The last column is what must
        be read for a token over the time it took, and that against a streaming read in the same turns; of what a
        certificate speaks of, gate or output layer, all is counted, though a half or less of it is not read. Ratios are of
        medians."""
    large, small, large_512, large_amx, small_amx = (
        {row["model"]: row["to_llama_cpp"] for row in result.rows} for result in results
    )
    ratio, fast = (
        large[name] / large["llama.cpp, Q8_0"] for name in ("prepared, int8", "prepared, int8, compiled")
    )
    ours = [name for name in large if name.startswith("prepared") and "int8" not in name]
    best = max(small[name] for name in small if name.startswith("prepared, compiled"))
    reading = f"""
        At the shape of 1B the compiled step in bfloat16 is at {times(max(large[name] for name in ours))} of llama.cpp in the
        same dtype with AVX2 alone, {times(large_512["prepared, compiled, all certified"])} and
        {times(large_amx["prepared, compiled, all certified"])} on the machines with AVX-512. llama.cpp's Q8_0, which reads half
        of the bytes of every weight, is at {times(large["llama.cpp, Q8_0"])} on the first: who may quantise should. Skipping in
        int8 is at {times(ratio)} of that, and in a compiled step at {times(fast)}, which is
        {times(large["prepared, int8, compiled"] / large["prepared, compiled"])} of what bfloat16 gives there.

        **Where we lose.** In int8 on the machine with AMX, the faster way is at
        {times(large_amx["prepared, int8, compiled"] / large_amx["llama.cpp, Q8_0"])} of Q8_0
        (AVX-512 without it: {times(large_512["prepared, int8"] / large_512["llama.cpp, Q8_0"])}). A step of a model as small as
        SmolLM2-135M is for the most part [what lies around the kernels](#a-step): {times(small["prepared"])}, compiled
        {times(best)} and {times(small_amx["prepared, compiled, all certified"])}, and in int8
        {times(small["prepared, int8, compiled"] / small["llama.cpp, Q8_0"])} of Q8_0; certificates take longer there than what
        they spare. On the machine with AMX llama.cpp is a good deal slower in bfloat16 than in Q8_0, more than the bytes explain.

        The machine with AVX-512 alone was measured before graphs called operators in C++, and the one with AMX before
        products of the same tokens were one call. "Of a read" can be more than all: rows that certificates leave out are
        counted, and memory that others use as well is not as fast in every turn."""
    head = [
        "CPU",
        "weights",
        "program",
        "sparsity",
        "tokens/s",
        "to llama.cpp",
        "to transformers",
        "GB/s, of a read",
    ]
    drawn = "![Tokens per second of llama.cpp, transformers and hf_sparse](figures/against_llama_cpp.svg)"
    drawn += "\n\n*The machine with AVX2.*"
    return "\n\n".join([*conditions, paragraph(about), drawn, table(head, lines, 3), paragraph(reading)])


CALIBRATED = (
    "calibrated_avx512.json",
    "calibrated.json",
    "calibrated_compiled.json",
    "calibrated_smollm2.json",
)


def calibrated(*results: Result) -> str:
    lines, conditions = [], []
    for result, file in zip(results, CALIBRATED, strict=True):
        groups = [result.rows[i : i + 3] for i in range(0, len(result.rows), 3)]
        for dense, stock, sparse in groups:
            low, high = sparse["speedup_quartiles"]
            lines.append(
                [
                    result["provenance"]["instructions"],
                    f"{sparse['layers']} × {sparse['hidden']} × {sparse['neurons']}, {sparse['of']}",
                    f"`{sparse['method']}`, {percent(sparse['sparsity'])}"
                    + (", compiled" if sparse.get("compiled") else ""),
                    *(f"{row['tokens_per_s']:.1f}" for row in (stock, dense, sparse)),
                    times(sparse["speedup"] / stock["speedup"]),
                    f"**{times(sparse['speedup'])}** ({low:.2f} to {high:.2f})",
                ]
            )
        conditions.append(f"{result.conditions} [All rows](../benchmarks/results/{file}).")
    first = results[0].rows[0]
    about = f"""
        {DTYPES[first["dtype"]]}, one sequence, {first["new_tokens"]} new tokens. The last column is against the same
        model on the same kernels with nothing skipped. `teal` counts the weights of attention and MLPs that meet a
        zero, `wina` likewise, `scap` those of MLPs, `cats` silent neurons; the output matrix (a fifth of the weights of
        both models) is always read. Where it says *compiled*, the
        dense and the calibrated step are, and the stock one is not. Wanted was 1.35× for `teal` at the 1B shape: the
        machine with AVX-512 reaches it, the other with a compiled step, and without in some runs only. The gate of `cats` is
        read in full, and so are matrices of attention. The run on SmolLM2 was stopped after `teal`; its command names more."""
    head = [
        "CPU",
        "`generate()`, tokens/s",
        "method",
        "stock",
        "same kernels, dense",
        "calibrated",
        "to stock",
        "to dense",
    ]
    return "\n\n".join([*conditions, paragraph(about), table(head, lines, 3)])


def calibration(result: Result) -> str:
    dense, *rows = result.rows
    targets = sorted({row["target"] for row in rows})
    at = {(row["method"], row["target"]): row for row in rows}
    lines = [
        [
            f"`{method}`",
            *(_reached(at[method, t]) if (method, t) in at else "" for t in targets),
        ]
        for method in dict.fromkeys(row["method"] for row in rows)
    ]
    about = f"""
        {dense["model"]}, float32, without any training: perplexity on {dense["tokens"]:,} tokens of C4's validation
        split in windows of {dense["window"]}; dense {dense["perplexity"]:.1f}. Thresholds are from
        {dense["calibration_tokens"]:,} tokens of its training split. A column is a target, and in brackets is what was
        reached on these tokens, of what each method prunes: `teal` and
        `wina` of the weights of attention and MLPs, `scap` of those of the MLPs, `cats` of the neurons' values
        (which leaves the gate projection out). So columns compare methods with the same count only. `teal-greedy` was
        run at one target only, where it is worse than `teal`; `fatrelu` is for models with ReLU."""
    return f"""\
{result.conditions} [All rows](../benchmarks/results/calibration.json).

{paragraph(about)}

{table(["perplexity at", *(percent(t) for t in targets)], lines)}

The rows are from {_commands(rows)}."""


def _reached(row: Row) -> str:
    return f"{row['perplexity']:.1f} ({row['sparsity'] * 100:.1f})"


def _commands(rows: Sequence[Row]) -> str:
    return " and ".join(dict.fromkeys(f"`{row['command']}`" for row in rows))


_RUNS = {"relu--0": "ReLU", "prosparse-5.0-0": "ProSparse"}
"""What folders of runs were called before the script took names."""


FINETUNED = "finetuned.json", "finetuned_targets.json"


def finetuned_decode(*results: Result) -> str:
    first = results[0].rows[0]
    turns = " and ".join(str(result.rows[0]["generate"]["repeats"]) for result in results)
    about = f"""
        Finetuned checkpoints of [results/smollm2.md](results/smollm2.md), {DTYPES[first["dtype"]]}, one sequence,
        {first["prompts"]} prompts of {first["prompt_tokens"]} tokens, {first["new_tokens"]} new ones each. Ratios are
        to the dense line above, as transformers runs it, within a turn, of which there are {turns}: differences below a
        tenth are noise. Dense is the checkpoint that was finetuned dense in the first run, and the original model in the
        second; *compiled* is `hf_sparse.prepare(model, compile=True)`. With 90 % of the
        neurons silent a step still reads 64 % of this model's weights: the output layer, attention and all gates."""
    parts = []
    for result, file in zip(results, FINETUNED, strict=True):
        rows = []
        for row in result.rows:
            low, high = row["speedup_quartiles"]
            ratio = f"{times(row['speedup'])} ({low:.2f} to {high:.2f})"
            name, *way = row["model"].split(", ")
            label = ", ".join([_RUNS.get(name, name), *way])
            rows.append([label, percent(row["sparsity"]), f"{row['tokens_per_s']:.1f}", ratio])
        parts.append(f"{result.conditions} [All rows](../benchmarks/results/{file}).")
        parts.append(table(["`generate()`", "sparsity", "tokens/s", "ratio"], rows))
    return "\n\n".join([paragraph(about), *parts])


def step(result: Result) -> str:
    first = result.rows[0]
    sizes = f"{first['layers']} × {first['hidden']} × {first['neurons']}"
    about = f"""
        Where the time of a token goes: {sizes}, {first["of"]} weights, {DTYPES[first["dtype"]]},
        {percent(first["sparsity"])} of the neurons silent, {first["new_tokens"]} tokens of greedy `generate()`; medians
        of {first["step"]["repeats"]} turns. "Around" is what is no call of a kernel of the package: operators of torch
        (in the first line all linear layers but the MLPs), the Python of transformers and ours."""
    rows = []
    for row in result.rows:
        total, inside, around = (f"{row[part]['median_ms']:.1f}" for part in ("step", "kernels", "around"))
        share = row["around"]["median_ms"] / row["step"]["median_ms"]
        rows.append([row["model"], total, inside, f"{around} ({percent(share)})", f"{row['calls']:.0f}"])
    return f"""\
{result.conditions} [All rows](../benchmarks/results/step.json).

{paragraph(about)}

{table(["model", "step, ms", "in kernels", "around", "kernel calls"], rows)}"""


def several(result: Result) -> str:
    first = result.rows[0]
    about = f"""
        SmolLM2-135M finetuned to 90 % ([results/smollm2.md](results/smollm2.md), "target 90 %") against the original
        model as transformers runs it, {DTYPES[first["dtype"]]}, {first["prompt_tokens"]} tokens of real text each,
        {first["new_tokens"]} new ones. A step for several tokens reads what any of them needs. A draft is what
        transformers looks up in the text so far (`prompt_lookup_num_tokens`), and one step verifies; "tokens a step" is
        what was accepted. The last column is to the same model with one sequence and no draft, in tokens per second."""
    rows = [
        [
            row["model"],
            str(row["batch"]),
            str(row["draft"] or ""),
            f"{row['tokens_per_s']:.1f}",
            f"{row['tokens_per_step']:.2f}",
            times(row["to_dense"]),
            times(row["to_one_by_one"]),
        ]
        for row in result.rows
    ]
    head = ["model", "sequences", "draft", "tokens/s", "tokens a step", "to dense", "to one by one"]
    return f"""\
{result.conditions} [All rows](../benchmarks/results/several_tokens.json).

{paragraph(about)}

{table(head, rows)}"""


def untrained(result: Result) -> str:
    first = result.rows[0]
    about = f"""
        The model that comes with the package (1.4 M parameters), float32, with a patch and no training: perplexity of
        {first["tokens"]:,} tokens of its held-out text, in windows of {first["window"]}, and the share of exact zeros
        that reach the down projections. Thresholds of CATS are from its training text."""
    rows = [[row["patch"], f"{row['perplexity']:.1f}", percent(row["sparsity"])] for row in result.rows]
    return f"""\
{result.conditions} [All rows](../benchmarks/results/untrained.json).

{paragraph(about)}

{table(["patch", "perplexity", "sparsity"], rows)}"""


def training_step(result: Result) -> str:
    first = result.rows[0]
    about = f"""
        An update of a Llama of the shape of SmolLM2-135M: {first["batch"]} × {first["length"]} tokens in pieces of
        {first["micro_batch"]}, float32, by turns, {first["update"]["repeats"]} of each; the same loss after the first.
        Time and memory are shares of those of transformers.Trainer without sparsity; peak memory is that of each trainer
        alone."""
    rows = []
    for row in result.rows:
        low, high = row["share_quartiles"]
        share = f"{row['share_of_the_first'] * 100:.1f} % ({low * 100:.1f} to {high * 100:.1f})"
        seconds, memory = row["update"]["median_ms"] / 1e3, row["memory_share_of_the_first"]
        rows.append(
            [f"{row['trainer']}", f"{seconds:.2f}", share, f"{row['peak_mib']:.0f}", f"{memory * 100:.1f} %"]
        )
    return f"""\
{result.conditions} [All rows](../benchmarks/results/training_step.json).

{paragraph(about)}

{table(["trainer", "s an update", "time", "peak MiB", "memory"], rows)}"""


def trained(result: Result) -> str:
    def cell(row: Row) -> str:
        low, high = (row["speedup"][end] for end in ("low", "high"))
        return f"{times(row['speedup']['median'])} ({low:.2f}–{high:.2f})"

    def kept(row: Row) -> str:
        return f"{row['dense_kept_mib']:.0f} → {row['skipping_kept_mib']:.1f}"

    index = {"MLP": lambda row: f"{row['hidden']} → {row['neurons']}", "dtype": lambda row: row["dtype"]}
    dense = {(row["shape"], row["dtype"]): row["dense_gflop_per_s"] for row in result.rows}
    rates = ", ".join(f"{rate:.0f} GFLOP/s ({shape}, {dtype})" for (shape, dtype), rate in dense.items())
    tokens = result.rows[0]["tokens"]
    about = f"""
        A step of one gated MLP with {tokens:,} tokens, forward and backward, to gradients of the input and of all weights:
        [computing only active pairs](kernels.md#training-where-few-neurons-are-active) against dense training of the same
        block by torch, by turns, with quartiles. Dense training ran at {rates}: where bfloat16 will do, its row is the
        one to look at, for float32 is slow in torch on AMD CPUs."""
    return f"""\
{result.conditions} [All rows](../benchmarks/results/trained_mlp.json).

{paragraph(about)}

{pivot(result.rows, index, sparsity, cell)}

MiB that are kept for the backward pass, dense and skipping, beside the input and the weights:

{pivot(result.rows, index, sparsity, kept)}"""


def finetuned(result: Result) -> str:
    names = {
        "dense": "dense baseline",
        "relu": "ReLU substitution",
        "prosparse": "ReLU and progressive L1 (`prosparse`, L1 `scale` 25)",
        "prosparse-100": "the same, L1 `scale` 100",
    }
    lines = []
    for run in result["runs"]:
        last = run["evaluations"][-1]
        active = 1 - last["sparsity"]
        shares = f"{last['sparsity'] * 100:.1f} %", f"{active * 100:.1f} %"
        lines.append([names[run["name"]], f"{last['perplexity']:.2f}", *shares])
    return f"""\
Real Llama, real C4: 260 K parameters (stories260K), 1,000 updates of 2,048 tokens, all runs on the same tokens, float32; one
seed; {result["date"]}. It shows that the parts work together, not what sparsity costs a large model. Conditions, commands and
layers are in [results/c4-stories260k.md](results/c4-stories260k.md).

{table(["run", "perplexity", "sparsity", "density"], lines)}"""


SECTIONS = (
    Section("Benchmarks", (), introduction, level=1),
    Section("One MLP, one token", ("mlp_decode.json",), decode),
    Section("Certified skip", ("mlp_certified.json",), certified),
    Section("Several tokens in one call", ("mlp_batch.json",), batch),
    Section(
        "Where nothing can be skipped",
        ("mlp_dense.json", "mlp_dense_shapes.json", "mlp_dense_dtypes.json"),
        dense,
    ),
    Section("Mixtures of experts", ("experts.json",), experts),
    Section("Under a LoRA adapter", ("lora.json",), lora),
    Section("`generate()`", ("generate.json",), generate),
    Section("Against llama.cpp", PEERS, peers),
    Section("A step", ("step.json",), step),
    Section("Several tokens in one `generate()`", ("several_tokens.json",), several),
    Section("Calibrated, without training", CALIBRATED, calibrated),
    Section("What calibration costs", ("calibration.json",), calibration, level=3),
    Section("A patch without training", ("untrained.json",), untrained, level=3),
    Section("Finetuned checkpoints", FINETUNED, finetuned_decode),
    Section("A busy neighbour", ("busy_neighbour.json",), busy),
    Section("Loading", ("loading.json",), loading),
    Section("An update of a training", ("training_step.json",), training_step),
    Section("Training one MLP", ("trained_mlp.json",), trained),
    Section("Finetuned for sparsity", ("../../docs/results/c4-stories260k.json",), finetuned),
)
