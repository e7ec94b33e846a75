// Browsers start no worker from a file. There the search's script runs in a hidden frame instead.
if (location.protocol === "file:")
  window.IFrameWorker = window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      const frame = document.createElement("iframe")
      this.started = new Promise((resolve) => {
        frame.onload = () => {
          const inside = frame.contentWindow
          inside.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }))
          const script = frame.contentDocument.createElement("script")
          script.src = url
          script.onload = () => resolve(inside)
          frame.contentDocument.body.append(script)
        }
      })
      frame.hidden = true
      frame.srcdoc = "<body></body>"
      document.body.append(frame)
    }
    postMessage(data) {
      this.started.then((inside) => inside.dispatchEvent(new MessageEvent("message", { data })))
    }
  }
