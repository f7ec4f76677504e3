"""The data path of gradient-based methods: task -> fast weights -> target loss after each inner step."""
