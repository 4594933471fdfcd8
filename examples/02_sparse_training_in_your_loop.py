"""Three lines make any PyTorch loop train sparse, and aware of the unknown."""

import torch
from sklearn.datasets import load_digits
from torch import nn

from moon.trainer import Sparsifier, UnknownAwareLoss

digits = load_digits()
x = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
y = torch.tensor(digits.target)

torch.manual_seed(0)
# Ten digits and one output for the unknown.
model = nn.Sequential(
    nn.Conv2d(1, 32, 3, padding=1),
    nn.ReLU(),
    nn.MaxPool2d(2),
    nn.Conv2d(32, 64, 3, padding=1),
    nn.ReLU(),
    nn.Flatten(),
    nn.Linear(64 * 16, 11),
)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)

epochs, batches = 20, torch.arange(1400).split(50)
sparsifier = Sparsifier(
    model, optimizer, density=0.1, rule="rigl", total_steps=epochs * len(batches)
)
criterion = UnknownAwareLoss(total_epochs=epochs, warmup_epochs=2)

for epoch in range(1, epochs + 1):
    criterion.start_epoch(epoch)
    for batch in batches:
        optimizer.zero_grad()
        criterion(model(x[batch]), y[batch]).backward()
        optimizer.step()  # masks the gradients, and updates the topology when it is time

with torch.no_grad():
    accuracy = (model(x[1400:])[:, :10].argmax(1) == y[1400:]).float().mean()
weights = [weight for weight in model.parameters() if weight.ndim > 1]
kept, total = sum(int(w.count_nonzero()) for w in weights), sum(w.numel() for w in weights)
print(f"accuracy {accuracy:.1%} with {kept:,} of {total:,} weights")
print(f"{sparsifier.turnover:.0%} of the connections moved in training")
