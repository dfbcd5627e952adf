// Search runs in a Worker, which browsers refuse to pages that are read from disk. There, and only there, a hidden frame
// takes the place of it: the same script, with messages passed between the two windows.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const inside =
        "postMessage = message => parent.postMessage(message, '*');" +
        "importScripts = (...urls) => urls.reduce((before, url) => before.then(() => new Promise(done => {" +
        "const script = document.createElement('script'); script.src = url; script.onload = done;" +
        "document.body.append(script) })), Promise.resolve());";
      this.onmessage = this.onerror = null;
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      this.ready = new Promise(done => this.frame.addEventListener("load", done));
      this.frame.srcdoc = `<!doctype html><body><script>${inside}</script><script src="${url}"></script></body>`;
      document.body.append(this.frame);
      this.listen = event => {
        if (event.source !== this.frame.contentWindow) return;
        const passed = new MessageEvent("message", { data: event.data });
        this.dispatchEvent(passed);
        if (this.onmessage) this.onmessage(passed);
      };
      window.addEventListener("message", this.listen);
    }

    postMessage(message) {
      // Not the frame's postMessage, which the script inside has for what goes out.
      this.ready.then(() => window.postMessage.call(this.frame.contentWindow, message, "*"));
    }

    terminate() {
      window.removeEventListener("message", this.listen);
      this.frame.remove();
    }
  };
}
