"""What is measured: samples against real images, weights and gradients without training, medians with intervals."""
