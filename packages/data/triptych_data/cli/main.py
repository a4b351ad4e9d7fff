"""The `triptych-data` command; what a subcommand needs is imported when it runs."""

import click

from triptych_data.cli.index import index, verify
from triptych_data.cli.latents import latents
from triptych_data.cli.look import inspect, preview
from triptych_data.cli.mix import ledger, mix
from triptych_data.cli.options import OneLineErrors
from triptych_data.cli.shard import reshard, shard


@click.group(cls=OneLineErrors, context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Multimodal chats as indexed WebDataset shards: write, check, look at them.

    \b
    Example:
      triptych-data shard chats.jsonl shards/
      triptych-data verify shards/
      triptych-data inspect shards/ --model Qwen3-VL-8B --seq-len 8192
      triptych-data preview shards/ --model Qwen3-VL-8B -o preview.html
    MODEL is a local Hugging Face folder; each command has --help with examples, and --json.
    """


for command in (shard, index, verify, inspect, preview, mix, reshard, ledger, latents):
    main.add_command(command)
