"""What figures and tables call the methods that this package knows."""

# As the paper writes them. Methods of other names are shown as they are named.
METHOD_LABELS = {
    "at": "AT",
    "at_awp": "AT-AWP",
    "autoaugment": "AutoAugment",
    "cyclic": "Cyclic",
    "entropy_sgd": "Entropy-SGD",
    "gelu": "GeLU",
    "label_noise": "Label noise",
    "label_smoothing": "Label smoothing",
    "larger_eps": "Larger ε",
    "late_multi_step": "“Late” multi-step",
    "mart": "MART",
    "mish": "MiSH",
    "self_supervision": "Self-supervision",
    "silu": "SiLU",
    "trades": "TRADES",
    "unlabeled": "+Unlabeled",
    "weight_averaging": "Weight averaging",
    "weight_clipping": "Weight clipping",
    "weight_decay": "Weight decay",
    # Beyond Table 1, as sweeps and the paper's other models are called.
    "adam": "Adam",
    "attack_steps": "Attack steps",
    "batch_size": "Batch size",
    "constant_rate": "Constant learning rate",
    "dropout": "Dropout",
    "ignore_incorrect": "Ignore incorrect",
    "learning_rate": "Learning rate",
    "pgd_tau": "PGD-τ",
    "prevent_label_leaking": "Prevent label leaking",
}
