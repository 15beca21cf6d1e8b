"""Options that several commands of the command line have, with their help."""

from typing import Annotated

import typer

Directory = Annotated[
    str,
    typer.Argument(
        help="adapter: a directory, a packaged one such as smollm2, or user/name@revision on the hub",
        show_default=False,
    ),
]
BaseOption = Annotated[
    str | None, typer.Option("--base", help="base model, if not the one that the adapter names", show_default=False)
]
DeviceOption = Annotated[
    str | None, typer.Option("--device", help="e.g. cpu, cuda:1; default CUDA where there is one", show_default=False)
]
DtypeOption = Annotated[
    str | None,
    typer.Option(
        help="e.g. float32; tuned: the fastest by `pardec tune`; default float32 on a CPU", show_default=False
    ),
]
TopK = Annotated[int | None, typer.Option(help="sample of the k likeliest tokens", show_default=False)]
TopP = Annotated[float | None, typer.Option(help="sample of the likeliest that sum to p", show_default=False)]
MinP = Annotated[float | None, typer.Option(help="sample of those min_p times the likeliest", show_default=False)]
Seed = Annotated[
    int | None,
    typer.Option(help="makes sampling repeatable; further texts take the next", show_default=False),
]
NumSpeculativeTokens = Annotated[
    int | None,
    typer.Option(help="drafted tokens per step; default the tuned choice, else all trained", show_default=False),
]
Temperature = Annotated[
    float, typer.Option(help="0 is greedy: the likeliest token, whatever top-k, top-p and min-p are")
]
Mode = Annotated[
    str | None, typer.Option(help="fused, two_pass or plain; default the tuned choice, else fused", show_default=False)
]
Verification = Annotated[str, typer.Option(help="of sampled drafts: token, one by one, or block, all together")]
CopyTokens = Annotated[
    int | None,
    typer.Option(
        help="tokens copied from the text, verified with the drafts; default the tuned choice, else 0",
        show_default=False,
    ),
]
UseHead = Annotated[
    bool | None,
    typer.Option("--head/--no-head", help="use the sampler head; default unless tuned without", show_default=False),
]
AsChat = Annotated[bool, typer.Option("--chat", help="each prompt is a user's message for the chat template")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="run the base's own code")]
Compile = Annotated[
    bool, typer.Option("--compile", help="compile steps: first texts wait for it, up to minutes, later ones are faster")
]
