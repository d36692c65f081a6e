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

/** localStorage and sessionStorage may be forbidden; then nothing is remembered. */
function remembered(storage, key, value) {
  try {
    if (value !== undefined) window[storage].setItem(key, value);
    return window[storage].getItem(key);
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
  remembered("localStorage", "chat-theme", next);
  setTheme(next);
});
const savedTheme = remembered("localStorage", "chat-theme");
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

  let chosen = remembered("sessionStorage", "chat-name"); // each tab is somebody of its own
  let socket = null;
  let me = null; // {id, name}, as the server has it
  let attempt = 0;
  let timer = null;
  let hadConnection = false;
  let people = new Map();
  let last = null; // {id, time} of the last message, for grouping
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
    const all = [...people].map(([id, name]) => ({ id, name }));
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

  function connect() {
    clearTimeout(timer);
    setStatus("connecting", "Connecting");
    $("banner").hidden = true;
    const url = new URL(path, location.href);
    url.protocol = url.protocol.replace("http", "ws");
    url.searchParams.set("name", chosen);
    const opening = new WebSocket(url);
    let openedAt = Infinity;
    socket = opening;
    opening.addEventListener("open", () => {
      openedAt = Date.now();
    });
    opening.addEventListener("message", (event) => {
      if (opening === socket) receive(JSON.parse(event.data));
    });
    opening.addEventListener("close", () => {
      if (opening !== socket) return; // closed by us, for another one
      if (Date.now() - openedAt > STABLE) attempt = 0;
      reconnectLater();
    });
  }

  /** Wait for a random time below a bound that doubles: not everybody comes back at once. */
  function reconnectLater() {
    socket = null;
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
        if (hadConnection) addNotice("You are back. What was said meanwhile did not reach you.");
        hadConnection = true;
        break;
      case "join":
      case "leave":
        people = new Map(message.people);
        showPeople();
        if (message.who.id !== me?.id) {
          addNotice(`${message.who.name} ${message.type === "join" ? "joined" : "left"}`, message.time);
        }
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

  $("text").addEventListener("input", showSend);
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
    socket.send(JSON.stringify({ text }));
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
    $("name").value = chosen ?? remembered("localStorage", "chat-name") ?? `${any(FIRST)} ${any(SECOND)}`;
    $("ask").showModal();
    $("name").select();
  }
  $("ask").addEventListener("close", () => {
    // Control characters and lone surrogates are no part of a name, or of an address.
    const name = $("name").value.replace(/\p{C}/gu, "").trim() || chosen || "Guest";
    $("text").focus();
    if (name === chosen) return;
    chosen = name;
    remembered("sessionStorage", "chat-name", name);
    remembered("localStorage", "chat-name", name);
    const old = socket;
    hadConnection = false;
    connect();
    old?.close();
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
