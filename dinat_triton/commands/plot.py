"""`dinat-triton plot`: figures of windows, receptive fields, plans and attention as files, or as characters."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from dinat_triton.commands.inputs import RANDOM, add_weights, build, picture
from dinat_triton.commands.options import add_out
from dinat_triton.files import FIGURES, check_target
from dinat_triton.geometry import BORDERS, SHIFT, Geometry
from dinat_triton.plan import Plan
from dinat_triton.words import counted

MAX_TOKENS, MAX_FIELD, MAX_PAIRS = 1 << 16, 1 << 20, 1 << 22


def configure(parser: argparse.ArgumentParser) -> None:
    figures = parser.add_subparsers(dest="figure", metavar="FIGURE", required=True)
    _neighborhood(figures.add_parser("neighborhood", help="the keys a query sees, or the queries that see a key"))
    _receptive_field(figures.add_parser("receptive-field", help="what reaches a token through a stack of layers"))
    _plan(figures.add_parser("plan", help="tiles, what they load, and what that costs"))
    _attention(figures.add_parser("attention", help="where a token of a model attends, drawn back on a picture"))
    for figure in figures.choices.values():
        output = figure.add_argument_group("output (at least one)")
        add_out(output, "write the figure: .png, .svg or .pdf")
        output.add_argument("--term", action="store_true", help="print it in characters")


def run(args: argparse.Namespace) -> int:
    if args.out is None and not args.term:
        raise ValueError("say where the figure goes: -o FILE.{png,svg,pdf}, --term, or both")
    if args.out is not None:
        check_target(args.out, endings=FIGURES, force=args.force)
    figure, text = args.draw(args)
    if args.term:
        print(text)
    if args.out is not None:
        from dinat_triton import plots

        plots.save(figure, args.out)
        print(f"wrote {args.out}")
    return 0


def _window_arguments(parser: argparse.ArgumentParser, shape: list[int], kernel: int) -> None:
    parser.add_argument("--shape", type=int, nargs="+", default=shape, metavar="N", help="tokens along 1 to 3 axes")
    parser.add_argument(
        "--kernel-size", type=int, nargs="+", default=[kernel], metavar="K", help="one, or one per axis"
    )
    parser.add_argument("--dilation", type=int, nargs="+", default=[1], metavar="D", help="one, or one per axis")
    parser.add_argument("--stride", type=int, nargs="+", default=[1], metavar="S", help="one, or one per axis")
    parser.add_argument("--causal", type=int, nargs="+", default=[0], choices=(0, 1), help="one, or one per axis")
    _border_argument(parser)


def _border_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--border", nargs="+", default=[SHIFT], choices=BORDERS, help="one, or one per axis")


def _geometry(args: argparse.Namespace) -> Geometry:
    kernel_size, dilation, stride = (tuple(values) for values in (args.kernel_size, args.dilation, args.stride))
    is_causal, border = tuple(map(bool, args.causal)), tuple(args.border)
    geometry = Geometry(tuple(args.shape), kernel_size, dilation, stride, is_causal, border)
    if geometry.num_tokens > MAX_TOKENS:
        raise ValueError(f"--shape has {geometry.num_tokens} tokens; a figure shows up to {MAX_TOKENS}")
    return geometry


def _position(args: argparse.Namespace, geometry: Geometry) -> tuple[int, ...]:
    return tuple(n // 2 for n in geometry.shape) if args.at is None else tuple(args.at)


def _neighborhood(parser: argparse.ArgumentParser) -> None:
    _window_arguments(parser, [16, 16], 5)
    parser.add_argument("--at", type=int, nargs="+", metavar="I", help="position of the query; the middle by default")
    parser.add_argument("--inverse", action="store_true", help="the position is a key's: mark the queries that see it")
    parser.set_defaults(draw=_draw_neighborhood)


def _draw_neighborhood(args: argparse.Namespace):
    from dinat_triton import plots

    geometry = _geometry(args)
    position = _position(args, geometry)
    text = plots.text_cells(plots.neighborhood(geometry, position, args.inverse))
    return plots.plot_neighborhood(geometry, position, inverse=args.inverse), text


def _receptive_field(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", type=int, nargs="+", default=[56, 56], metavar="N", help="tokens along 1 to 3 axes")
    parser.add_argument("--kernel-size", type=int, default=7, metavar="K")
    parser.add_argument("--dilations", type=int, nargs="+", default=[1, 8, 1], metavar="D", help="one per layer")
    _border_argument(parser)
    parser.add_argument("--at", type=int, nargs="+", metavar="I", help="position of the token; the middle by default")
    parser.add_argument("--heat", action="store_true", help="the share that each input contributes")
    parser.add_argument("--compare", action="store_true", help="draw NAT and Swin of the same depth beside it")
    parser.set_defaults(draw=_draw_receptive_field)


def _draw_receptive_field(args: argparse.Namespace):
    from dinat_triton import plots, receptive_field

    if len(args.dilations) > 64:
        raise ValueError(f"--dilations takes up to 64 layers, got {len(args.dilations)}")
    if math.prod(args.shape) > MAX_FIELD:
        raise ValueError(f"--shape has {math.prod(args.shape)} tokens; a receptive field has up to {MAX_FIELD}")
    layers = receptive_field.dilated_stack(args.shape, args.kernel_size, args.dilations, args.border)
    stacks = {f"dilations {' '.join(map(str, args.dilations))}": layers}
    if args.compare:
        stacks["NAT"] = receptive_field.dilated_stack(args.shape, args.kernel_size, [1] * len(layers), args.border)
        stacks["Swin"] = receptive_field.swin_stack(args.shape, args.kernel_size, len(layers))
    texts = []
    for depth, field in enumerate(receptive_field.growth(layers, args.at), 1):
        picture = plots.text_heat(field.heat) if args.heat else plots.text_cells(field.mask)
        texts.append(f"after layer {depth}: {counted(field.size, 'token')}, {field.coverage:.3g} %\n{picture}")
    return plots.plot_receptive_fields(stacks, args.at, heat=args.heat), "\n\n".join(texts)


def _plan(parser: argparse.ArgumentParser) -> None:
    _window_arguments(parser, [14, 14], 5)
    parser.add_argument("--tile", type=int, nargs="+", default=[4], metavar="T", help="rows along one axis, or each")
    parser.add_argument("--at", type=int, nargs="+", metavar="I", help="a row of the tile to show")
    parser.add_argument("--transposed", action="store_true", help="tiles of keys and the queries that see them")
    parser.add_argument("--cost", action="store_true", help="draw the cost over tile sizes instead")
    parser.set_defaults(draw=_draw_plan)


def _draw_plan(args: argparse.Namespace):
    from dinat_triton import plots

    geometry = _geometry(args)
    if max(args.tile) > MAX_TOKENS:
        raise ValueError(f"--tile takes up to {MAX_TOKENS} rows along an axis, got {max(args.tile)}")
    plan = Plan(geometry, tuple(args.tile), transposed=args.transposed)
    cost = plan.cost()
    if cost.table_entries > MAX_PAIRS:
        raise ValueError(
            f"--tile {plan.tile} has {cost.table_entries} pairs over all classes, up to {MAX_PAIRS} are drawn"
        )
    position = _position(args, geometry)
    figure = plots.plot_cost(geometry) if args.cost else plots.plot_plan(plan, position)
    lines = [
        plots.text_cells(plots.tile_cells(plan, position)),
        f"tiles of {' x '.join(map(str, plan.tile))} in {counted(cost.launches, 'class')}",
        f"scores per query: {cost.scores_per_query:.1f} evaluated, {cost.useful_per_query:.1f} attend",
        f"loads per query: {cost.col_loads / cost.queries:.2f}",
    ]
    return figure, "\n".join(lines)


def _attention(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="dinat_mini", help="a NAT or DiNAT of timm (default: dinat_mini)")
    add_weights(parser, RANDOM)
    parser.add_argument("--image", type=Path, metavar="FILE", help="a picture; a drawn landscape by default")
    parser.add_argument("--layers", type=int, nargs="+", metavar="L", help="which attention layers, counted from 0")
    parser.add_argument("--heads", type=int, nargs="+", metavar="H", help="which heads (default: the first three)")
    parser.add_argument(
        "--at", type=float, nargs=2, default=[0.5, 0.5], metavar="F", help="the query: fractions of height and width"
    )
    parser.set_defaults(draw=_draw_attention)


def _draw_attention(args: argparse.Namespace):
    from dinat_triton import plots
    from dinat_triton.attention_maps import attention_layers, token_at

    model, picture, images = _load_model(args)
    layers = attention_layers(model, images)
    chosen = [0, 1, len(layers) // 2] if args.layers is None else args.layers
    for number in chosen:
        if not 0 <= number < len(layers):
            raise ValueError(f"--layers must be between 0 and {len(layers) - 1}, got {number}")
    maps, queries = {}, {}
    for layer in (layers[number] for number in chosen):
        queries[layer.title] = token_at(args.at, layer.x.shape[1:3])
        maps[layer.title] = layer.attention(queries[layer.title])[0]
        most = len(maps[layer.title])
        if args.heads is not None and not all(0 <= head < most for head in args.heads):
            raise ValueError(f"--heads must be between 0 and {most - 1} in {layer.name}, got {args.heads}")
    text = "\n\n".join(f"{title}\n{plots.text_heat(weights.mean(0))}" for title, weights in maps.items())
    return plots.plot_attention(picture, maps, queries, args.heads), text


def _load_model(args: argparse.Namespace):
    """The model, the picture as the model crops it, and the normalised batch of one."""
    import torch
    from timm.data.config import resolve_model_data_config
    from timm.data.transforms_factory import create_transform

    image = picture(args.image)
    model, origin = build(args.model, args.weights)
    print(f"{args.model} with {origin}")
    config = resolve_model_data_config(model.eval())
    x = create_transform(**config)(image)
    mean, std = (torch.tensor(config[name]).view(3, 1, 1) for name in ("mean", "std"))
    return model, (x * std + mean).clamp(0, 1), x[None]
