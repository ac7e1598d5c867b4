"""Truth about the gate on real images: planted defects, real reruns, brute-forced best settings."""
