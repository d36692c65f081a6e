const form = document.querySelector("form");
const output = document.querySelector("output");

function draw({ votes, watching }) {
  let total = 0;
  for (const button of form.elements) {
    const count = votes[button.value] ?? 0;
    button.style.setProperty("--count", count);
    button.querySelector("b").textContent = count;
    total += count;
  }
  form.style.setProperty("--total", total);
  document.querySelector("#total").textContent = total;
  document.querySelector("#watching").textContent = watching;
}

function mark(choice) {
  for (const button of form.elements) button.ariaPressed = button.value === choice;
}

function say(state, text) {
  output.dataset.state = state;
  output.textContent = text;
  document.querySelector("#watching").parentElement.hidden = state !== "live";
}

let pause = 1000; // milliseconds before the next try

function connect() {
  const ws = new WebSocket(location.origin.replace("http", "ws") + "/ws");
  ws.onmessage = (event) => {
    const message = JSON.parse(event.data);
    if ("mine" in message) return mark(message.mine);
    draw(message);
    say("live", "Live");
    pause = 1000;
  };
  ws.onclose = () => {
    say("lost", "Offline. Trying again.");
    setTimeout(connect, pause / 2 + (Math.random() * pause) / 2); // not all at the same time
    pause = Math.min(pause * 2, 30_000);
  };
}

form.onsubmit = async (event) => {
  event.preventDefault();
  const body = new FormData(form, event.submitter);
  try {
    const answer = await fetch(form.action, { method: "POST", body, redirect: "manual" });
    if (answer.status >= 400) throw new Error(`The vote was answered ${answer.status}.`);
    mark(body.get("choice"));
  } catch {
    say("lost", "Your vote did not arrive.");
  }
};

say("connecting", "Connecting");
connect();
