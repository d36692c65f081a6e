const form = document.querySelector("form");

function draw(votes) {
  let total = 0;
  for (const button of form.elements) {
    const count = votes[button.value] ?? 0;
    button.style.setProperty("--count", count);
    button.querySelector("b").textContent = count;
    total += count;
  }
  form.style.setProperty("--total", total);
  document.querySelector("#total").textContent = total;
}

const ws = new WebSocket(location.origin.replace("http", "ws") + "/ws");
ws.onmessage = (event) => draw(JSON.parse(event.data));

form.onsubmit = (event) => {
  event.preventDefault();
  const body = new FormData(form, event.submitter);
  fetch(form.action, { method: "POST", body, redirect: "manual" });
};
