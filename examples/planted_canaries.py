"""Does a model give away what stood once, four times or sixteen times in its training texts?

Plant canaries, secrets drawn from a template, in the training data; train; ask how much likelier each
of them is than all other secrets of its kind, and how many training texts come back after their first words.
Here the model "tiny" is trained on, for half a minute: ``pip install "attnfit[lm]"``.
"""

# %% The canaries: four of each kind, and four that are never planted, which show what chance gives.

from random import Random

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from attnfit import audit
from attnfit.audit.models.tiny_text import private_sentences

REPEATS = (0, 1, 4, 16)
secrets = audit.canaries("The code of the door is {digits:3}.", 16, repeats=REPEATS * 4)
print(secrets.n_possible, "codes are possible;", secrets.texts[1], "is planted once")

# %% Train on them and on sentences; other sentences of the same kind are kept aside.

model = audit.load("tiny")
new = [text for text in private_sentences(Random(1)) if text not in model.private_texts]
members, others = new[:100], new[100:200]
batches = [model.tokenise(text) for text in [*members, *secrets.inserted()]]
model.module.requires_grad_(True).train()
adam = torch.optim.Adam(model.module.parameters(), lr=1e-3)
random = Random(0)
for _ in range(4):
    for tokens in random.sample(batches, len(batches)):
        row = torch.tensor([tokens])
        loss = cross_entropy(model.module(input_ids=row).logits[0, :-1], row[0, 1:])
        adam.zero_grad()
        loss.backward()
        adam.step()
model.module.requires_grad_(False).eval()

# %% What it has memorised: three measures, each with its interval.

found = audit.memorised(model, members, others, prefixes=[4, 6], suffix=5, canaries=secrets)
print(found)
for count in REPEATS:
    bits = found.exposure.bits[np.array(secrets.repeats) == count]
    print(f"planted {count:2d} times: {bits.mean():4.1f} bits of {found.exposure.largest:.1f} on average")
