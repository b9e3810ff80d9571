"""Medical devices in X-rays: the screener, readings and answers of people, the sheet that asks them."""
