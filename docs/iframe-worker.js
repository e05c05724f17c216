// A browser refuses workers to a page that was opened from disk.  There the site's search runs in a hidden frame.
if (location.protocol === "file:") {
  window.Worker = class {
    constructor(url) {
      this.waiting = [];
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      this.frame.onload = () => {
        this.waiting.forEach((data) => this.frame.contentWindow.hear(data));
        this.waiting = null;
      };
      const bridge = `
        hear = (data) => setTimeout(() => onmessage({ data: structuredClone(data) }));
        postMessage = (data) => frameElement.tell(data);
      `;
      this.frame.tell = (data) => setTimeout(() => this.onmessage && this.onmessage({ data: structuredClone(data) }));
      this.frame.srcdoc = `<script>${bridge}<\/script><script src="${new URL(url, location)}"><\/script>`;
      document.body.append(this.frame);
    }

    postMessage(data) {
      if (this.waiting) this.waiting.push(data);
      else this.frame.contentWindow.hear(data);
    }

    terminate() {
      this.frame.remove();
    }
  };
}
