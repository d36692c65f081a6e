const { url, samples: kept } = document.body.dataset; // Flask's url_for makes it ws:// or wss://
const output = document.querySelector("output");
const cards = [...document.querySelectorAll("section")].map((section) => ({
  ...section.dataset,
  value: section.querySelector("b"),
  range: section.querySelector("small"),
  line: section.querySelector(".line"),
  area: section.querySelector(".area"),
}));
let samples = [];

function draw() {
  for (const card of cards) {
    const values = samples.map((sample) => sample[card.name] * card.scale);
    const text = (value) => value.toFixed(card.digits);
    const [low, high] = [Math.min(...values), Math.max(...values)];
    card.value.textContent = text(values.at(-1));
    card.range.textContent = `${text(low)} to ${text(high)} in ${Math.round(samples.length / 2)} s`;
    // The newest is at the right edge; the line begins at zero and has air above it.
    const width = Math.max(values.length - 1, 20);
    const x = (index) => 100 - ((values.length - 1 - index) * 100) / width;
    const y = (value) => 39 - (value * 35) / (high || 1);
    const line = values.map((value, index) => `${x(index).toFixed(2)} ${y(value).toFixed(2)}`).join("L");
    card.line.setAttribute("d", `M${line}`);
    card.area.setAttribute("d", `M${line}L100 40L${x(0).toFixed(2)} 40Z`);
  }
}

function say(state, text) {
  output.dataset.state = state;
  output.textContent = text;
}

let pause = 1000; // milliseconds before the next try

function connect() {
  const ws = new WebSocket(url);
  ws.onmessage = (event) => {
    const message = JSON.parse(event.data);
    samples = Array.isArray(message) ? message : [...samples, message].slice(-kept);
    if (samples.length) draw();
    say("live", "Live");
    pause = 1000;
  };
  ws.onclose = () => {
    say("lost", "Offline. Trying again.");
    setTimeout(connect, pause / 2 + (Math.random() * pause) / 2); // not all at the same time
    pause = Math.min(pause * 2, 30_000);
  };
}

const [more, fewer] = [document.querySelector("#more"), document.querySelector("#fewer")];
const MOST = 200; // a browser has room for 255
const others = new Set();

function count() {
  more.disabled = others.size >= MOST;
  fewer.disabled = others.size === 0;
}

more.onclick = () => {
  for (let number = 0; number < 20; number++) {
    const ws = new WebSocket(url);
    others.add(ws);
    ws.onclose = () => {
      others.delete(ws);
      count();
    };
  }
  count();
};
fewer.onclick = () => others.forEach((ws) => ws.close());

connect();
