// Draws what comes, at most once a frame and device: the newest.
const { url } = document.body.dataset; // Flask's url_for makes it ws:// or wss://
const $ = (id) => document.getElementById(id);
const output = document.querySelector("output");
const SILENT = 3000; // milliseconds without a reading
const tiles = new Map(); // device -> its tile
const fresh = new Map(); // device -> the newest reading, not drawn yet
const still = matchMedia("(prefers-reduced-motion: reduce)");
let received = 0; // on this connection
let counted = { at: performance.now(), received }; // when the rate was shown last
let newest = 0; // when the newest reading was made, in seconds of the server
let ahead = Infinity; // our clock's lead: the least that a reading has ever seemed to take

function tileOf(device) {
  let tile = tiles.get(device);
  if (!tile) {
    const element = document.createElement("section");
    element.className = "tile";
    element.innerHTML = "<h2><span></span><b></b></h2><svg viewBox='0 -50 100 100' preserveAspectRatio='none'><path/></svg>";
    element.querySelector("span").textContent = `#${device}`;
    tile = { device, element, value: element.querySelector("b"), path: element.querySelector("path"), seen: 0 };
    tiles.set(device, tile);
    const next = [...tiles.values()].filter((other) => other.device > device).sort((a, b) => a.device - b.device)[0];
    $("tiles").insertBefore(element, next?.element ?? null);
    $("empty").hidden = true;
  }
  return tile;
}

function draw() {
  for (const [device, wave] of fresh) {
    const tile = tileOf(device);
    const loudest = Math.max(...wave.map(Math.abs));
    const step = Math.ceil(wave.length / 200); // more points than that nobody sees
    const points = [];
    for (let n = 0; n < wave.length; n += step) points.push(`${((n * 100) / wave.length).toFixed(1)} ${(-wave[n] / 20).toFixed(1)}`);
    tile.path.setAttribute("d", `M${points.join("L")}`);
    tile.value.textContent = loudest;
    tile.element.style.setProperty("--hue", Math.round(150 - loudest * 0.13)); // green to red
    tile.element.classList.remove("silent");
    tile.seen = performance.now();
  }
  fresh.clear();
  if (still.matches) setTimeout(draw, 1000);
  else requestAnimationFrame(draw);
}

function summarize() {
  const now = performance.now(); // after a freeze it is not a second later
  $("rate").textContent = Math.round((received - counted.received) / ((now - counted.at) / 1000));
  counted = { at: now, received };
  if (newest) $("age").textContent = Math.max(0, Date.now() - newest * 1000 - ahead).toFixed(0);
  for (const tile of tiles.values()) {
    if (now - tile.seen > SILENT) tile.element.classList.add("silent");
  }
}

function say(state, text) {
  output.dataset.state = state;
  output.textContent = text;
}

let pause = 1000; // milliseconds before the next try

function connect() {
  const ws = new WebSocket(url);
  counted.received = received = 0;
  ws.onmessage = (event) => {
    const message = JSON.parse(event.data);
    if (message.wave) {
      received += 1;
      newest = Math.max(newest, message.time);
      ahead = Math.min(ahead, Date.now() - message.time * 1000);
      fresh.set(message.device, message.wave);
      return;
    }
    $("online").textContent = message.online;
    $("skipped").textContent = message.skipped.toLocaleString("en");
    $("sent").textContent = (received + message.skipped).toLocaleString("en");
    $("skipped").toggleAttribute("data-some", message.skipped > 0);
    say("live", "Live");
    pause = 1000;
  };
  ws.onclose = () => {
    say("lost", "Offline. Trying again.");
    setTimeout(connect, pause / 2 + (Math.random() * pause) / 2); // not all at the same time
    pause = Math.min(pause * 2, 30_000);
  };
}

function freeze(seconds) {
  const text = $("freeze").textContent;
  $("freeze").disabled = true;
  $("freeze").textContent = "Frozen";
  setTimeout(() => {
    const end = performance.now() + seconds * 1000;
    while (performance.now() < end); // nothing else runs, and nothing is read
    $("freeze").disabled = false;
    $("freeze").textContent = text;
  }, 100); // when the button has been drawn
}

$("freeze").onclick = () => freeze(5);

connect();
draw();
setInterval(summarize, 1000);
