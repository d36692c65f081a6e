// Two WebSockets, one for each panel. Each comes back when it is lost, for as long as the login holds.
"use strict";

const member = document.body.dataset.member;
const sockets = new Set(); // to be closed when the login is over or the page is left
let over = !member; // nobody is logged in, or nobody is any more

/** Make an element. Text goes in as text, never as HTML. */
function make(tag, className, ...children) {
  const element = document.createElement(tag);
  element.className = className;
  element.append(...children);
  return element;
}

/** A name keeps its colour, in every browser. */
function paint(circle, name) {
  let hash = 0x811c9dc5; // FNV-1a
  for (const letter of name) hash = Math.imul(hash ^ letter.codePointAt(0), 0x01000193) >>> 0;
  const words = name.split(/\s+/).filter(Boolean);
  circle.style.setProperty("--hue", (hash % 24) * 15);
  circle.textContent = words.slice(0, 2).map((word) => [...word][0].toUpperCase()).join("");
  circle.ariaHidden = "true";
  return circle;
}

// -- the connections -------------------------------------------------------------------------

/** Show the login in place of the room. */
function showLogin(why) {
  if (over) return;
  over = true;
  for (const ws of sockets) ws.close();
  document.querySelector("#room").hidden = true;
  document.querySelector("#door").hidden = false;
  document.querySelector("#why").textContent = why;
  document.querySelector("#why").hidden = false;
  document.querySelector("#name").value = member;
  document.querySelector("#name").select();
}

/** Keep a panel connected. Returns a function that sends, and says whether it could. */
function connect(panel, receive, back = () => {}) {
  const output = panel.querySelector("output");
  const url = new URL(panel.dataset.path, location.href);
  let ws = null;
  let pause = 1000; // milliseconds before the next try
  let openedAt = Infinity;

  function say(state, text) {
    output.dataset.state = panel.dataset.state = state;
    output.textContent = text;
    for (const button of panel.querySelectorAll("form button")) button.disabled = state !== "live";
  }

  function start() {
    ws = new WebSocket(url.href.replace("http", "ws"));
    sockets.add(ws);
    ws.onopen = () => {
      if (panel.dataset.state === "lost") back();
      openedAt = Date.now();
      say("live", "Live");
    };
    ws.onmessage = (event) => receive(...JSON.parse(event.data));
    ws.onclose = (event) => {
      sockets.delete(event.target);
      if (over) return;
      if (Date.now() - openedAt > 5000) pause = 1000; // it was no connection that ends at once
      openedAt = Infinity;
      if (event.code === 4401 && event.reason === "logged out") return showLogin("You were logged out.");
      const known = event.code === 4400 || event.code === 1009; // what was sent was not right
      later(known ? event.reason : "Offline");
    };
  }

  /** Wait for a random time below a bound that doubles: not everybody comes back at once. */
  function later(text) {
    say("lost", text);
    setTimeout(again, pause / 2 + (Math.random() * pause) / 2);
    pause = Math.min(pause * 2, 30_000);
  }

  /** A handshake that is refused looks like a server that is away. So ask for the page first. */
  async function again() {
    try {
      const answer = await fetch(location.href, { signal: AbortSignal.timeout(10_000) });
      if (!answer.ok) throw new Error(`The page was answered ${answer.status}.`);
      const anew = new DOMParser().parseFromString(await answer.text(), "text/html");
      if (over) return;
      if (anew.body.dataset.member === member) start();
      else showLogin("Your login is over.");
    } catch {
      if (!over) later("Offline");
    }
  }

  say("connecting", "Connecting");
  start();
  return (text) => {
    if (ws.readyState !== WebSocket.OPEN) return false;
    ws.send(text);
    return true;
  };
}

// -- the panel of the plain view: what is written, once to everybody ---------------------------

const MAX_NOTES = 200; // older ones leave the page
const clock = new Intl.DateTimeFormat([], { hour: "2-digit", minute: "2-digit" });

function showNotes(panel) {
  const list = panel.querySelector("ol");
  const scroll = panel.querySelector(".scroll");
  const input = panel.querySelector("input");
  let follow = true; // the end is in sight, and shall stay so

  function toEnd() {
    if (follow) scroll.scrollTop = scroll.scrollHeight;
  }

  function add(line, mine = false) {
    follow ||= mine;
    list.append(line);
    while (list.childElementCount > MAX_NOTES) list.firstElementChild.remove();
    panel.querySelector(".empty").hidden = true;
    toEnd();
  }

  new ResizeObserver(toEnd).observe(scroll);
  scroll.onscroll = () => {
    follow = scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < 80;
  };

  function receive(name, text) {
    const head = make("p", "head", make("b", "", name), " ", make("time", "", clock.format()));
    const note = make("li", name === member ? "mine" : "", paint(make("span", "avatar"), name), head);
    note.append(make("p", "text", text));
    add(note, name === member);
  }

  const send = connect(panel, receive, () => {
    if (list.childElementCount) add(make("li", "gap", "You are back. Notes from meanwhile are not here."));
  });
  panel.querySelector("form").onsubmit = (event) => {
    event.preventDefault();
    const text = input.value.trim();
    if (text && send(text)) input.value = ""; // what could not be sent stays
    input.focus();
  };
  input.focus();
}

// -- the panel of the async view: a beat a second from everybody --------------------------------

const GONE = 3000; // milliseconds without a beat
const SHOWN = 8000; // milliseconds that a sign is shown
const SIGNS = { hello: "Hello!", coffee: "Coffee?", hooray: "Hooray!" };
const still = matchMedia("(prefers-reduced-motion: reduce)");

function showPulse(panel) {
  const list = panel.querySelector("ul");
  const people = new Map(); // name -> its line, when it was heard, when its sign is over

  function receive(name, sign) {
    let person = people.get(name);
    if (!person) {
      const line = make("li", "", paint(make("span", "avatar"), name), make("b", "", name));
      line.append(name === member ? make("span", "tag", "you") : "", make("span", "sign"));
      person = { line, signUntil: 0 };
      people.set(name, person);
      const names = [...people.keys()].sort((a, b) => (b === member) - (a === member) || a.localeCompare(b));
      list.replaceChildren(...names.map((each) => people.get(each).line));
    }
    person.heard = Date.now();
    if (sign) {
      person.signUntil = Date.now() + SHOWN;
      person.line.querySelector(".sign").textContent = SIGNS[sign];
    }
    if (still.matches) return;
    const beat = [{ boxShadow: "0 0 0 0 var(--beat)" }, { boxShadow: "0 0 0 12px transparent" }];
    person.line.firstElementChild.animate(beat, { duration: 300, easing: "ease-out" });
  }

  setInterval(() => {
    for (const [name, person] of people) {
      if (panel.dataset.state !== "live") person.heard = Date.now(); // nobody can be heard
      if (Date.now() > person.signUntil) person.line.querySelector(".sign").textContent = "";
      if (Date.now() > person.heard + GONE) {
        people.delete(name);
        person.line.remove();
      }
    }
  }, 250);

  const send = connect(panel, receive);
  panel.querySelector("form").onsubmit = (event) => {
    event.preventDefault();
    send(event.submitter.value);
  };
}

if (member) {
  paint(document.querySelector("#me"), member);
  showNotes(document.querySelector("#notes"));
  showPulse(document.querySelector("#pulse"));
}
// A browser may keep a page that was left. Who comes back gets it anew, or the login.
addEventListener("pagehide", () => {
  over = true;
  for (const ws of sockets) ws.close();
});
addEventListener("pageshow", (event) => {
  if (event.persisted) location.reload();
});
