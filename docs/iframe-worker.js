/* Search in pages that are opened from files: browsers start no worker there, so an iframe stands for it. */
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      document.body.appendChild(frame);
      const inside = frame.contentWindow;
      this.inside = inside;
      inside.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
      inside.importScripts = (...scripts) => scripts.reduce((done, each) => done.then(() => load(inside, each)), Promise.resolve());
      this.ready = load(inside, url);
    }
    postMessage(data) {
      this.ready.then(() => this.inside.dispatchEvent(new MessageEvent("message", { data })));
    }
    terminate() {}
  };
  const load = (inside, url) =>
    new Promise((loaded) => {
      const script = inside.document.createElement("script");
      script.src = url;
      script.onload = loaded;
      inside.document.body.appendChild(script);
    });
}
