"""Plants bugs, each in a copy of the tree, and runs the tests that should catch it: `make mutants`.

With words, only bugs that have one in their name or file. Fails if a text is not found once, or a bug not caught.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# By file and tests: what the bug is, the right text, the wrong one.
# fmt: off
BUGS = {
    "dinat_triton/geometry.py test_geometry": [
        ("window off by one", "else self.kernel // 2)", "else self.kernel // 2 - 1)"),
        ("causal leader", "(self.stride - 1 if", "(self.stride if"),
        ("stride leader", "else self.stride // 2)", "else (self.stride - 1) // 2)"),
        ("residue class order", "own = index * self.dilation + residue", "own = index + len(index) * residue"),
        ("clipped leader", "if self.border == SHIFT:\n", "if self.border != WRAP:\n"),
        ("other end of a circle", "(first - length, past - length)", "(first, past)"),
        ("transposed plan observers", '(end, key, side="right")', '(end, key, side="left")'),
        ("wrong axis", "total * shape[axis] + index", "total * shape[axis - 1] + index")],
    "dinat_triton/geometry.py test_plan": [("border", "self.kernel + self.stride", "self.kernel // 2")],
    "dinat_triton/runs.py test_plan": [("seam of tiles", "- self.column, self.seam,", "- self.column,")],
    "dinat_triton/tile_groups.py test_brute": [("a circle in order", "for x in vectors)", "for x in vectors[:1])")],
    "dinat_triton/reference.py test_brute": [
        ("missed mask", "logits.masked_fill(~seen[..., None], -torch.inf)", "logits"),
        ("GQA head grouping", "b n (h g) d", "b n (g h) d")],
    "dinat_triton/reference.py test_functional": [("dropout not made up for", "* keep / (1 - dropout_p)", "* keep")],
    "dinat_triton/dropout.py test_dropout": [("dropout rounds", "range(10)", "range(9)")],
    "dinat_triton/dropout.py kernels/test_interpreted": [("pair of a draw", "(seed, key, query", "(seed, query, key")],
    "dinat_triton/bias.py test_brute": [("bias gradient of one pair", "sums.index_add_(1", "sums.index_copy_(1")],
    "dinat_triton/tiled.py test_brute": [
        ("delta sign", "dp.sub_((p * dp)", "dp.add_((p * dp)"),
        ("dk scale missing", "(ds.mT @ qt).mul_(scale)", "(ds.mT @ qt)")],
    "dinat_triton/ops.py test_brute": [
        ("lse gradient lost", "grad_lse if ctx.need_lse else None", "None"),
        ("another default scale", "else scale\n    seed", "else scale * 1.1\n    seed")],
    "dinat_triton/padding.py test_modules": [
        ("padding at the wrong end", "[0, missing]", "[missing, 0]"),
        ("cropping at the wrong end", "x.narrow(axis, 0,", "x.narrow(axis, x.shape[axis] - like.shape[axis],")],
    "dinat_triton/ops.py test_dynamic": [("a graph of one size", "if torch.SymInt not in map(type, shape)", "if True")],
    "dinat_triton/distributed/shares.py test_sharded_maps": [
        ("stride groups of a share", "(row + self.start // self.axis.dilation) % self.axis.stride", "0"),
        ("causal leader of a share", "np.maximum(last_leader, reached[-1])", "reached[-1:]")],
    "dinat_triton/distributed/exchange.py test_sharded_maps": [
        ("gradients from several ranks", "whole.index_add_(dim", "whole.index_copy_(dim")],
    "dinat_triton/distributed/attention.py test_sharded_maps": [
        ("keys are awaited first", "inner = [part.inner for part in awaited]", "inner = [None for _ in awaited]"),
        ("queries of another piece", "query.narrow(dim, self.first,", "query.narrow(dim, 0,")],
    "dinat_triton/distributed/costs.py test_sharded_maps": [
        ("bytes of queries", "total += token.query", "total += 0 * token.query")],
    "dinat_triton/distributed/dtensors.py test_sharded_maps": [
        ("bias gradient of one rank", "shared(local, groups)", "shared(local, groups[:0])")],
    "dinat_triton/distributed/agreement.py test_sharded_maps": [
        ("an error of one rank", "found or _first_problem(reports)", "found or None")],
    "dinat_triton/distributed/maps.py test_sharded_models": [
        ("padding inside a map", "Fetch(move, max(-start, 0)", "Fetch(move, padding")],
    "dinat_triton/distributed/models.py test_sharded_models": [
        ("drop path of one rank", "dist.broadcast(kept, group=group, group_src=0)", "pass"),
        ("parameter gradients of one rank", "sum_gradients(parameters, on.groups)", "pass")],
    "kernels/forward.py kernels/test_interpreted": [
        ("lse sign", "m * scale + tl.log2", "m * scale - tl.log2"),
        ("online sum does not shrink", "total_next += total * shrink", "total_next += total"),
        ("key heads of a group", "kv_head = head // group", "kv_head = head % group"),
        ("batch offset", "store_row(lse + row_at,", "store_row(lse + row_at - i,")],
    "kernels/primitives.py kernels/test_interpreted": [
        ("last-channel mask", "channel[None, :] < CHANNELS", "channel[None, :] <= CHANNELS"),
        ("token stride", "at + tok[:, None] * stride + chan", "at + tok[:, None] * CHANNELS + chan"),
        ("missed mask of a tile", 'seen, other=float("-inf")', "seen, other=0.0"),
        ("end of a row's window", "< count.to(tl.uint32)", "<= count.to(tl.uint32)"),
        ("columns that a row does not see", "(row_word & col_word) == 0", "(row_word & col_word) <= 1"),
        ("unscaled bias", ".to(tl.float32) * inv_scale", ".to(tl.float32)"),
        ("a hidden key is read", "tl.where(shown != 0, tok, -1)", "tl.where(tok >= 0, tok, -1)"),
        ("table order of accumulators", "n // 4 % 4 * 2 + n % 2", "n // 4 % 4 + n % 2 * 4")],
    "kernels/backward.py kernels/test_interpreted": [
        ("dq scale", "dot(ds, k_tile, None, PRECISION) * scale", "dot(ds, k_tile, None, PRECISION)"),
        ("dv without dropout", "dropped.to(do_tile.dtype), do_tile, dv", "p.to(do_tile.dtype), do_tile, dv"),
        ("bias gradient of one batch split", "count = (end - first) * splits", "count = end - first")],
    "kernels/prepare.py test_prepare": [("any address is aligned", "data_ptr() % ALIGNMENT", "data_ptr() % 1")],
    "tests/oracles/gpu.py test_compiled": [("dropped barrier", ".decode()", '.decode().replace("bar.sync", "//")')],
    "tests/oracles/ptx/memory.py test_machine": [("races go unseen", 'raise Fault("warps meet', 'print("warps meet')],
    "models/layouts.py test_checkpoints": [
        ("key template", '"layernorm_before.{p}"', '"layernorm_after.{p}"'),
        ("order of query and key", 'for name in ("query", "key", "value")]', 'for name in ("key", "query", "value")]')],
    "models/dilations.py test_models": [("dilation of a variant", "13], [1, 6], [1, 3]", "13], [1, 6], [1, 2]")],
    "models/dinat.py test_models": [
        ("drop path", "drop_path[sum(depths[:i]) : sum(depths[: i + 1])]", "drop_path[: depths[i]]"),
        ("norm before the MLP", "self.mlp(self.norm2(x))", "self.mlp(self.norm1(x))")],
    "dinat_triton/integrations/natten/arguments.py test_natten_namespace": [
        ("NATTEN's argument order", '("dilation", "is_causal", "rpb", "sc', '("dilation", "rpb", "is_causal", "sc')],
    "dinat_triton/merging.py test_merging": [
        ("merged parts", "parts.softmax(0)", "parts.exp()"),
        ("empty parts that count", "masked_fill(lse.isneginf().unsqueeze(-1), 0)", "clone()")],
    "dinat_triton/integrations/natten/attention.py test_natten_attention": [
        ("queries behind the last key", "[:, :m], key, value, True", "[:, :m], key, value, False")],
    "dinat_triton/integrations/natten/installation.py test_natten_install": [
        ("natten stays imported", 'or name.startswith("natten.")', "")],
    "dinat_triton/integrations/dinat.py test_transformers": [
        ("transformers' dilation", '"dilation": self.dilation}', '"dilation": 1}'),
        ("dropout when evaluating", "self.dropout.p if self.dropout.training else 0.0", "self.dropout.p")],
    "dinat_triton/receptive_field.py test_plots": [("downsampling", "centre = 2 * ", "centre = 1 + 2 * ")],
    "dinat_triton/store.py test_store": [("nearest tuned entry", "min(keys, key=distance)", "max(keys, key=distance)")],
    "dinat_triton/tuner/search.py tuner/test_search": [("tuner's winner", "key=self.median)", "key=lambda _: 0)")],
    "bench/compare.py bench/test_compare": [("compare's percentiles", "self.b.p20 > s", "self.b.median > s")],
}
# fmt: on


def hunt(file: str, tests: str, name: str, old: str, new: str) -> list[str]:
    """The test that fails with the bug and passes without it, if any."""
    with tempfile.TemporaryDirectory() as folder:
        tree = shutil.copytree(ROOT, Path(folder, "tree"), symlinks=True, ignore=shutil.ignore_patterns(".*"))
        own = {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": str(int("kernels/" in tests))}
        right, done = (tree / file).read_text(), []
        for text, option in ((right.replace(old, new), "-x"), (right, "--last-failed")):
            (tree / file).write_text(text)
            command = [sys.executable, "-m", "pytest", "-q", option, f"tests/{tests}.py"]
            done.append(subprocess.run(command, cwd=tree, env=os.environ | own, capture_output=True, text=True))
    failed = re.findall(r"FAILED (.*?)(?: - |\n)", done[0].stdout) if [x.returncode for x in done] == [1, 0] else []
    print(f"{name:<30}  {''.join(failed) or 'SURVIVES'}", flush=True)
    return failed


def main(words: list[str]) -> None:
    bugs = [(*place.split(), *bug) for place, some in BUGS.items() for bug in some]
    bugs = [bug for bug in bugs if any(word in f"{bug[0]} {bug[2]}" for word in words)]
    if unclear := [name for file, _, name, old, _ in bugs if (ROOT / file).read_text().count(old) != 1]:
        sys.exit(f"the old text of a bug must be in its file exactly once, that of these is not: {', '.join(unclear)}")
    caught = list(ThreadPoolExecutor(2).map(hunt, *zip(*bugs, strict=True)))
    print(f"{sum(map(bool, caught))} of {len(bugs)} bugs were caught")
    sys.exit(not all(caught))


if __name__ == "__main__":
    main(sys.argv[1:] or [""])
