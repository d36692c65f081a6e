// The page of the chat: plain JavaScript, and one WebSocket that comes back when it is lost.
"use strict";

const $ = (id) => document.getElementById(id);

/** Make an element. Text goes in as text, never as HTML. */
function make(tag, className, ...children) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.append(...children);
  return element;
}

/** localStorage may be forbidden; then nothing is remembered. */
function remembered(key, value) {
  try {
    if (value !== undefined) localStorage.setItem(key, value);
    return localStorage.getItem(key);
  } catch {
    return null;
  }
}

// -- colours ---------------------------------------------------------------------------------

const THEMES = {
  "light dark": ["Colours: as the system", "M4 5h16v11H4ZM12 16v4M8 20h8"],
  light: ["Colours: light", "M12 8a4 4 0 1 0 0 8 4 4 0 0 0 0-8ZM12 2v2M12 20v2M2 12h2M20 12h2M5 5l1.4 1.4M17.6 17.6 19 19M5 19l1.4-1.4M17.6 6.4 19 5"],
  dark: ["Colours: dark", "M20 14.5A8.5 8.5 0 0 1 9.5 4a8.5 8.5 0 1 0 10.5 10.5Z"],
};

function setTheme(theme) {
  const [label, path] = THEMES[theme];
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const shape = document.createElementNS("http://www.w3.org/2000/svg", "path");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("class", "glyph");
  svg.setAttribute("aria-hidden", "true");
  shape.setAttribute("d", path);
  svg.append(shape);
  document.documentElement.style.colorScheme = theme;
  $("theme").replaceChildren(svg);
  $("theme").setAttribute("aria-label", label);
  $("theme").title = label;
  $("theme").dataset.theme = theme;
}

$("theme").addEventListener("click", () => {
  const names = Object.keys(THEMES);
  const next = names[(names.indexOf($("theme").dataset.theme) + 1) % names.length];
  remembered("chat-theme", next);
  setTheme(next);
});
const savedTheme = remembered("chat-theme");
setTheme(savedTheme in THEMES ? savedTheme : "light dark");

// -- the list of rooms -----------------------------------------------------------------------

function openRoom(event) {
  event.preventDefault();
  const name = $("open-name").value.trim().toLowerCase().replace(/[\s/\\?#%]+/g, "-").replace(/^[-.]+|-+$/g, "");
  if (name) location.assign($("open").dataset.url.replace("ROOM", () => encodeURIComponent(name)));
}

// -- a room ----------------------------------------------------------------------------------

function room() {
  const { path } = document.body.dataset;
  const limit = Number(document.body.dataset.limit);
  const title = document.title;
  const timeFormat = new Intl.DateTimeFormat([], { hour: "2-digit", minute: "2-digit" });

  const MAX_LINES = 500; // older ones leave the page
  const GROUP_SECONDS = 180; // one person's messages within this time share a head
  const BACKOFF = { base: 500, cap: 30_000 }; // milliseconds
  const STABLE = 5_000; // a connection that lasted so long makes the next wait short again
  const PATIENCE = 10_000; // for an answer to our name
  const TYPING = { every: 2_000, shown: 4_000 };

  let chosen = document.body.dataset.name || null; // the name that we want, and that the session has
  let told = chosen;
  let turns = 0; // each try to connect has a number; a later one takes over
  let socket = null;
  let me = null; // {id, name}, as the server has it
  let attempt = 0;
  let timer = null;
  let lost = false; // there was a connection
  let people = new Map(); // id -> who
  const typing = new Map(); // id -> who types, and the timer of it
  let typedAt = -Infinity;
  let last = null; // {id, time} of the last message, for grouping
  let newest = 0; // when the last message that we have was said
  let unread = 0;

  // -- people -------------------------------------------------------------------------------

  /** A name keeps its colour, also when its connection is a new one. */
  function hue(name) {
    let hash = 0x811c9dc5; // FNV-1a
    for (const letter of name) hash = Math.imul(hash ^ letter.codePointAt(0), 0x01000193) >>> 0;
    return (hash % 24) * 15;
  }

  function initials(name) {
    const words = name.split(/\s+/).filter(Boolean);
    const letters = words.length > 1 ? [words[0], words[words.length - 1]] : words;
    return letters.map((word) => [...word][0].toUpperCase()).join("");
  }

  function avatar(who) {
    const circle = make("span", "avatar", initials(who.name));
    circle.style.setProperty("--hue", hue(who.name));
    circle.setAttribute("aria-hidden", "true");
    return circle;
  }

  function showPeople() {
    const all = [...people.values()];
    all.sort((a, b) => (b.id === me?.id) - (a.id === me?.id) || a.name.localeCompare(b.name));
    $("people").replaceChildren(
      ...all.map((who) => {
        const line = make("li", "", avatar(who), make("span", "name", who.name));
        if (who.id === me?.id) line.append(make("span", "tag", "you"));
        return line;
      }),
    );
    $("people-count").textContent = String(all.length);
    const stack = all.slice(0, 3).map(avatar);
    if (all.length > 3) stack.push(make("span", "avatar more", `+${all.length - 3}`));
    $("stack").replaceChildren(...stack);
  }

  /** Who has come, who has left and who has another name now follows from the list. */
  function meet(list, time) {
    const before = people;
    people = new Map(list.map((who) => [who.id, who])); // one with two tabs is there once
    showPeople();
    if (!before.size) return; // we have just come
    for (const who of people.values()) {
      const old = before.get(who.id);
      if (!old) addNotice(`${who.name} joined`, time);
      else if (old.name !== who.name) addNotice(`${old.name} is ${who.name} now`, time);
    }
    for (const who of before.values()) {
      if (people.has(who.id)) continue;
      addNotice(`${who.name} left`, time);
      showTyping(who, false);
    }
  }

  function showTyping(who, types = true) {
    clearTimeout(typing.get(who.id)?.timer);
    typing.delete(who.id);
    if (types) typing.set(who.id, { who, timer: setTimeout(showTyping, TYPING.shown, who, false) });
    const names = [...typing.values()].map((one) => one.who.name);
    if (names.length > 2) $("typing").textContent = `${names.length} people are typing`;
    else if (names.length) $("typing").textContent = `${names.join(" and ")} ${names.length > 1 ? "are" : "is"} typing`;
    else $("typing").textContent = "";
  }

  function showMe() {
    $("you-name").textContent = me.name;
    const circle = avatar(me);
    circle.id = "you-avatar";
    $("you-avatar").replaceWith(circle);
  }

  // -- the conversation -----------------------------------------------------------------------

  function atEnd() {
    const box = $("scroll");
    return box.scrollHeight - box.scrollTop - box.clientHeight < 80;
  }

  function toEnd() {
    $("scroll").scrollTop = $("scroll").scrollHeight;
    $("jump").hidden = true;
  }

  function add(line, mine = false) {
    const follow = mine || atEnd();
    $("log").append(line);
    while ($("log").childElementCount > MAX_LINES) $("log").firstElementChild.remove();
    if (follow) toEnd();
    else if (line.classList.contains("message")) $("jump").hidden = false;
  }

  function clock(seconds) {
    const date = new Date(seconds * 1000);
    const time = make("time", "", timeFormat.format(date));
    time.dateTime = date.toISOString();
    time.title = date.toLocaleString();
    return time;
  }

  function addNotice(text, seconds) {
    last = null;
    const line = make("div", "notice", make("span", "", text));
    if (seconds) line.append(" ", clock(seconds));
    add(line);
  }

  function addMessage({ who, text, time }) {
    newest = time;
    showTyping(who, false);
    const mine = who.id === me?.id;
    const follows = last && last.id === who.id && time - last.time < GROUP_SECONDS;
    last = { id: who.id, time };
    const head = make("span", "head", make("strong", "", mine ? "You" : who.name), " ", clock(time));
    const line = make("div", `message${mine ? " mine" : ""}${follows ? " follows" : ""}`);
    line.append(avatar(who), head, make("p", "text", text));
    line.style.setProperty("--hue", hue(who.name));
    add(line, mine);
    if (document.hidden && !mine) {
      unread += 1;
      document.title = `(${unread}) ${title}`;
    }
  }

  // -- the connection -------------------------------------------------------------------------

  function setStatus(state, text) {
    $("status").dataset.state = state;
    $("status").textContent = text;
    showSend();
  }

  /** The handshake reads the name from the session, so the session has it first. */
  async function tellName(name) {
    try {
      const body = new URLSearchParams({ name });
      const answer = await fetch("", { method: "POST", body, signal: AbortSignal.timeout(PATIENCE) });
      if (answer.ok) told = name;
    } catch {
      told = null; // whether it arrived we do not know
    }
    return told === name;
  }

  async function connect() {
    clearTimeout(timer);
    setStatus("connecting", "Connecting");
    $("banner").hidden = true;
    const turn = ++turns;
    if (told !== chosen && !(await tellName(chosen))) {
      if (turn === turns) reconnectLater();
      return;
    }
    if (turn !== turns) return;
    const url = new URL(path, location.href);
    url.protocol = url.protocol.replace("http", "ws");
    const opening = new WebSocket(url);
    const former = socket; // under another name
    let openedAt = Infinity;
    let welcomed = false;
    socket = opening;
    opening.addEventListener("open", () => {
      openedAt = Date.now();
      former?.close();
    });
    opening.addEventListener("message", (event) => {
      if (opening !== socket) return;
      const message = JSON.parse(event.data);
      welcomed ||= message.type === "welcome";
      if (welcomed) receive(message); // what came before is in the welcome
    });
    opening.addEventListener("close", () => {
      former?.close();
      if (opening !== socket) return; // closed by us, for another one
      if (Date.now() - openedAt > STABLE) attempt = 0;
      reconnectLater();
    });
  }

  /** Wait for a random time below a bound that doubles: not everybody comes back at once. */
  function reconnectLater() {
    socket = null;
    told = null; // a server that comes back may have a new key for its sessions
    lost = Boolean(me);
    people = new Map();
    showPeople();
    const bound = Math.min(BACKOFF.cap, BACKOFF.base * 2 ** attempt);
    attempt += 1;
    const due = Date.now() + Math.random() * bound;
    setStatus("lost", "Offline");
    $("banner").hidden = false;
    const tick = () => {
      const seconds = Math.ceil((due - Date.now()) / 1000);
      if (due - Date.now() <= 0) return connect();
      $("banner-text").textContent = `The connection is lost. Next try in ${seconds} s.`;
      timer = setTimeout(tick, Math.min(250, due - Date.now()));
    };
    tick();
  }

  function reconnectNow() {
    if (!socket && chosen) connect();
  }

  function receive(message) {
    switch (message.type) {
      case "welcome":
        me = message.who;
        showMe();
        setStatus("open", "Connected");
        if (lost) addNotice("You are back");
        lost = false;
        message.said.filter((one) => one.time > newest).forEach(addMessage);
        break;
      case "people":
        meet(message.people, message.time);
        break;
      case "typing":
        if (message.who.id !== me.id) showTyping(message.who);
        break;
      case "message":
        addMessage(message);
        break;
      case "error":
        $("trouble").textContent = message.text;
        $("trouble").hidden = false;
        break;
    }
  }

  // -- writing --------------------------------------------------------------------------------

  function showSend() {
    const field = $("text");
    $("send").disabled = $("status").dataset.state !== "open" || !field.value.trim();
    const left = limit - field.value.length;
    $("left").hidden = left > 100;
    $("left").textContent = `${left} left`;
    field.style.height = "auto";
    field.style.height = `${field.scrollHeight}px`;
  }

  $("text").addEventListener("input", () => {
    showSend();
    const open = socket?.readyState === WebSocket.OPEN;
    if (!open || !$("text").value.trim() || Date.now() - typedAt < TYPING.every) return;
    typedAt = Date.now();
    socket.send("");
  });
  $("text").addEventListener("keydown", (event) => {
    // While an input method is composing, Enter belongs to it.
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      $("composer").requestSubmit();
    }
  });
  $("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    const text = $("text").value.trim();
    if (!text || socket?.readyState !== WebSocket.OPEN) return; // what was typed stays
    socket.send(text);
    typedAt = -Infinity;
    $("text").value = "";
    $("trouble").hidden = true;
    showSend();
    $("text").focus();
  });
  // Typing anywhere writes a message.
  document.addEventListener("keydown", (event) => {
    const free = event.target === document.body || event.target === $("scroll");
    const plain = !event.ctrlKey && !event.metaKey && !event.altKey;
    if (free && plain && event.key.length === 1 && event.key !== " ") $("text").focus();
  });

  // -- around it ------------------------------------------------------------------------------

  $("scroll").addEventListener("scroll", () => {
    if (atEnd()) $("jump").hidden = true;
  });
  new ResizeObserver(() => {
    if ($("jump").hidden) toEnd();
  }).observe($("scroll"));
  $("jump").addEventListener("click", () => {
    toEnd();
    $("text").focus();
  });
  $("retry").addEventListener("click", reconnectNow);
  addEventListener("online", reconnectNow);
  // A browser may keep a page that was left, its connection included, for the way back.
  addEventListener("pagehide", () => {
    clearTimeout(timer);
    turns += 1;
    told = null;
    people = new Map();
    const old = socket;
    socket = null;
    old?.close();
  });
  addEventListener("pageshow", (event) => {
    if (event.persisted) reconnectNow();
  });
  document.addEventListener("visibilitychange", () => {
    if (document.hidden) return;
    unread = 0;
    document.title = title;
  });

  function setMenu(open) {
    document.body.classList.toggle("menu-open", open);
    $("menu").setAttribute("aria-expanded", String(open));
  }
  $("menu").addEventListener("click", () => {
    setMenu(!document.body.classList.contains("menu-open"));
    if (document.body.classList.contains("menu-open")) $("side").querySelector("a").focus();
  });
  $("shade").addEventListener("click", () => setMenu(false));
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && document.body.classList.contains("menu-open")) {
      setMenu(false);
      $("menu").focus();
    }
  });

  // -- the name -------------------------------------------------------------------------------

  const FIRST = ["Quiet", "Curious", "Merry", "Patient", "Brave", "Sleepy", "Witty", "Gentle"];
  const SECOND = ["Otter", "Heron", "Badger", "Robin", "Hare", "Fox", "Wren", "Hedgehog"];
  const any = (list) => list[Math.floor(Math.random() * list.length)];

  function askName() {
    setMenu(false);
    $("name").value = chosen ?? remembered("chat-name") ?? `${any(FIRST)} ${any(SECOND)}`;
    $("ask").showModal();
    $("name").select();
  }
  $("ask").addEventListener("close", () => {
    // Control characters and lone surrogates are no part of a name, or of an address.
    const name = $("name").value.replace(/\p{C}/gu, "").trim() || chosen || "Guest";
    $("text").focus();
    if (name === chosen) return;
    chosen = name;
    remembered("chat-name", name);
    connect();
  });
  $("rename").addEventListener("click", askName);

  showSend();
  if (chosen) {
    connect();
    $("text").focus();
  } else {
    askName();
  }
}

if ($("open")) $("open").addEventListener("submit", openRoom);
else room();
