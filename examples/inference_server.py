"""A server that answers images with logits: batch norms folded once, and the forward pass by torch.compile."""

import threading
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch
from torchvision.models.resnet import BasicBlock, ResNet

import fusedres

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BATCH, SIZE, CLASSES = 2, 32, 10

torch.manual_seed(0)
model = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=CLASSES).to(DEVICE, memory_format=torch.channels_last)
model.eval()
model = fusedres.freeze(model)  # the one line; a fused copy. For a model that may change: fusedres.fuse(model)
compiled = torch.compile(model)
lock = threading.Lock()  # one batch at a time on one GPU


@torch.inference_mode()
def classify(images):
    with lock, torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda"):
        return compiled(images.to(DEVICE, memory_format=torch.channels_last)).to(torch.float32).cpu()


class Handler(BaseHTTPRequestHandler):
    """POST fp32 pixels, 3 x SIZE x SIZE of each image; the answer are the logits, fp32."""

    def do_POST(self):
        body = bytearray(self.rfile.read(int(self.headers["Content-Length"])))
        answer = classify(torch.frombuffer(body, dtype=torch.float32).view(-1, 3, SIZE, SIZE)).numpy().tobytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_):
        pass


classify(torch.zeros(BATCH, 3, SIZE, SIZE))  # compiled before the first request comes
with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    images = torch.randn(BATCH, 3, SIZE, SIZE)
    request = urllib.request.Request(f"http://127.0.0.1:{server.server_port}", images.numpy().tobytes(), method="POST")
    with urllib.request.urlopen(request, timeout=60) as answer:
        logits = torch.frombuffer(bytearray(answer.read()), dtype=torch.float32).view(BATCH, CLASSES)
    server.shutdown()
print("classes", logits.argmax(1).tolist())
print(fusedres.report(model))
