"""How far is a training step in bf16 from one in float32?

    python -m results.precision [MODEL [BATCH [STEPS]]]               default: B/2 16 300

Two tables, for a network with random weights and for one trained on the digits (as images of
32 x 32 x 4) for STEPS steps. A row is a choice of bf16 or float32 for the training pass and the
guidance, and for the JVP. It has the relative errors of du/dt, of loss_u and of the gradient: the
median of 5 batches. Beside them: how far the gradients of two batches are apart."""

import copy

import numpy as np
import torch
from torch.autograd.forward_ad import unpack_dual

import imf
import model
import sample
import train

PRECISIONS = ("bf16", "bf16"), ("bf16", "float32"), ("float32", "bf16")  # training pass, JVP
BATCHES = range(5)


def autocast(device, precision):
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def digits_as_latents(device):
    images, labels = train.digits(5000)
    pixels = torch.from_numpy(images).to(device) / 127.5 - 1
    return pixels.expand(-1, 4, -1, -1), torch.from_numpy(labels).to(device)


def batch_loss(net, data, number, batch_size):
    """imf_loss of batch number `number`, the same at every call."""
    pixels, labels = data
    generator = torch.Generator().manual_seed(number)
    index = torch.randint(len(pixels), (batch_size,), generator=generator)
    draws = imf.draw(pixels[index], generator)
    return imf.imf_loss(net, pixels[index], labels[index], draws)


def measure(net, data, number, batch_size, precision, jvp_precision):
    """(du/dt, loss_u, gradient) of a batch."""
    device = data[0].device
    net_u, du_dt = net.u, []

    def u(*args):  # the loss calls net.u for the JVP alone
        with autocast(device, jvp_precision):
            result = net_u(*args)
        du_dt.append(unpack_dual(result).tangent.float())
        return result

    net.u = u
    with autocast(device, precision):
        loss, logs = batch_loss(net, data, number, batch_size)
    del net.u
    net.zero_grad()
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in net.parameters()])
    return du_dt[0], logs["loss_u"], gradient


def distance(value, exact):
    return ((value - exact).norm() / exact.norm()).item()


def print_table(title, net, data, batch_size):
    exact = [measure(net, data, k, batch_size, "float32", "float32") for k in BATCHES]
    print(f"{title}: relative to float32, median of {len(BATCHES)} batches")
    for precision, jvp_precision in PRECISIONS:
        errors = []
        for k in BATCHES:
            found = measure(net, data, k, batch_size, precision, jvp_precision)
            errors.append([distance(*pair) for pair in zip(found, exact[k])])
        du_dt, loss_u, gradient = np.median(errors, 0)
        print(f"  {precision} with a {jvp_precision} JVP: "
              f"du/dt {du_dt:.2e}, loss_u {loss_u:.2e}, gradient {gradient:.2e}", flush=True)
    print(f"  the gradient of another batch: {distance(exact[0][2], exact[1][2]):.2e}")


def enliven(net):
    """Random numbers where a new network has zeros: its blocks and its last layers."""
    for block in (*net.shared_blocks, *net.u_heads, *net.v_heads):
        for scale in (block.attn_scale, block.mlp_scale):
            torch.nn.init.normal_(scale, 0.5, 0.25)
    for layer in (net.u_final_layer, net.v_final_layer):
        torch.nn.init.normal_(layer.linear.weight, std=layer.linear.in_features ** -0.5)


def short_training(net, data, steps, batch_size):
    """AdamW as in train.py, at a constant learning rate. Prints the last losses."""
    device = data[0].device
    precision = "bf16" if device.type == "cuda" else "float32"
    optimizer = torch.optim.AdamW(net.parameters(), 1e-4, betas=(0.9, 0.95), weight_decay=0)
    for k in range(steps):
        with autocast(device, precision):
            loss, logs = batch_loss(net, data, 1000 + k, batch_size)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"after {steps} steps: loss_u {logs['loss_u']:.3f}, loss_v {logs['loss_v']:.3f}")


def main():
    parser = sample.command_line(__doc__)
    flag = parser.add_argument
    flag("model", nargs="?", choices=model.MODELS, default="B/2")
    flag("batch_size", nargs="?", type=sample.number(int, 2), default=16, metavar="batch")
    flag("steps", nargs="?", type=sample.number(int, 1), default=300)
    args = parser.parse_args()
    device, *_ = sample.join()
    torch.set_float32_matmul_precision("highest")
    data = digits_as_latents(device)
    torch.manual_seed(0)
    net = model.DiT(32, 4, 10, **model.MODELS[args.model]).to(device)
    start = copy.deepcopy(net.state_dict())
    print(f"{args.model}, batch {args.batch_size}, {device}")

    enliven(net)
    print_table("random weights", net, data, args.batch_size)
    net.load_state_dict(start)
    short_training(net, data, args.steps, 128 if device.type == "cuda" else args.batch_size)
    print_table("trained", net, data, args.batch_size)


if __name__ == "__main__":
    sample.run(main)
