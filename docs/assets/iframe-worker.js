// Browsers refuse workers to pages that are opened as files. There the search runs in a hidden frame.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      frame.title = "search";
      document.body.append(frame);
      this.inside = frame.contentWindow;
      this.isReady = new Promise((resolve) => {
        const page = this.inside.document;
        page.open();
        page.close();
        this.inside.postMessage = (data) =>
          this.dispatchEvent(new MessageEvent("message", { data }));
        const script = page.createElement("script");
        script.src = url;
        script.onload = resolve;
        page.body.append(script);
      });
    }

    postMessage(data) {
      this.isReady.then(() =>
        this.inside.dispatchEvent(new this.inside.MessageEvent("message", { data })),
      );
    }
  };
}
