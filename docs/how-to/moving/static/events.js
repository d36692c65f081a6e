"use strict";

/** Events in JSON over a WebSocket that connects again: what a page needs of Socket.IO's client. */
class EventSocket {
  #path;
  #handlers = new Map();
  #waiting = new Map(); // id -> what to call when the server has acknowledged it
  #number = 0;
  #pause = 1000;
  #socket;

  constructor(path) {
    this.#path = path;
    this.#open();
  }

  on(event, handler) {
    this.#handlers.set(event, handler);
  }

  /** False if it cannot be sent now: nothing is kept for later. */
  emit(event, data, acknowledged) {
    if (this.#socket.readyState !== WebSocket.OPEN) return false;
    const id = ++this.#number;
    if (acknowledged) this.#waiting.set(id, acknowledged);
    this.#socket.send(JSON.stringify({...data, event, id}));
    return true;
  }

  #open() {
    this.#socket = new WebSocket(location.origin.replace("http", "ws") + this.#path);
    this.#socket.onopen = () => {
      this.#pause = 1000;
      this.#handlers.get("connect")?.();
    };
    this.#socket.onmessage = ({data: text}) => {
      const {event, data} = JSON.parse(text);
      if (event === "ack") {
        this.#waiting.get(data)?.();
        this.#waiting.delete(data);
      } else {
        this.#handlers.get(event)?.(data);
      }
    };
    this.#socket.onclose = () => {
      this.#waiting.clear(); // nobody knows whether these arrived
      this.#handlers.get("disconnect")?.();
      setTimeout(() => this.#open(), this.#pause * (0.5 + Math.random() / 2));
      this.#pause = Math.min(2 * this.#pause, 30_000);
    };
  }
}
