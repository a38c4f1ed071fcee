"""What engines that compute in this process share: calls, their scheduler, sampling, their thread and their face."""
