"""Medical devices in X-rays: the screener, people's readings and answers, and the sheet of doubtful images."""
