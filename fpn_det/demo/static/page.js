// Sends the image to /detect once; threshold and classes are applied here, so that moving them costs nothing.
const SVG = "http://www.w3.org/2000/svg";
const $ = (id) => document.getElementById(id);
const model = await (await fetch("model")).json();
let shown = null; // {name, width, height, detections} of the image on the page
let newest = 0; // number of the last image that was sent: answers to earlier ones come too late

$("title").textContent = model.title;
document.title = model.title;
$("about").querySelector("summary").textContent = `${model.classes.length} classes`;
$("about").querySelector("p").textContent = model.classes.map((c) => c.name).join(", ");
$("about").open = model.classes.length <= 10; // more would fill the screen of a phone
$("file").accept = model.suffixes.join(",");

async function open(file) {
  if (!file) return;
  const number = ++newest;
  if (file.size > model.max_bytes) {
    say(`${file.name}: ${(file.size / 2 ** 20).toFixed(1)} MiB, the limit is ${model.max_bytes / 2 ** 20} MiB`, true);
    return;
  }
  say(`looking at ${file.name} …`);
  $("view").classList.add("busy");
  let answer;
  try {
    const response = await fetch(`detect?name=${encodeURIComponent(file.name)}`, {
      method: "POST",
      headers: { "Content-Type": "application/octet-stream" },
      body: file,
    });
    const refusal = { error: `the server answers ${response.status} ${response.statusText}; try again` };
    answer = await response.json().catch(() => refusal); // its own refusals are JSON, a busy or failing server's not
  } catch {
    answer = { error: "the server does not answer; is it still running?" };
  }
  if (number !== newest) return;
  $("view").classList.remove("busy");
  if (answer.error) {
    say(answer.error, true);
    return;
  }
  URL.revokeObjectURL($("image").src);
  $("image").src = URL.createObjectURL(file);
  $("image").alt = `${file.name} with the boxes found in it`;
  const displayed = await $("image").decode().then(() => true, () => false);
  if (number !== newest) return;
  shown = { name: file.name, ...answer };
  $("view").style.width = `min(100%, ${(82 * shown.width) / shown.height}vh)`; // small images are enlarged
  $("view").hidden = !displayed;
  $("drop").hidden = true;
  $("panel").hidden = false;
  say(
    `${file.name}: ${answer.width} × ${answer.height} pixels, ${Math.round(answer.seconds * 1000)} ms` +
      (displayed ? "" : ". This browser cannot show such files; what was found is in the table"),
  );
  listClasses();
  draw();
}

function say(text, isError = false) {
  $("message").textContent = text;
  $("message").className = isError ? "error" : "";
}

function chosen() {
  const threshold = Number($("threshold").value);
  const off = new Set([...document.querySelectorAll("#classes input:not(:checked)")].map((box) => Number(box.value)));
  return shown.detections.filter((d) => d.score >= threshold && !off.has(d.label));
}

function listClasses() {
  for (const label of document.querySelectorAll("#classes label")) label.remove();
  for (const label of [...new Set(shown.detections.map((d) => d.label))].sort((a, b) => a - b)) {
    const { name, color } = model.classes[label];
    const row = document.createElement("label");
    const box = Object.assign(document.createElement("input"), { type: "checkbox", checked: true, value: label });
    box.addEventListener("change", draw);
    row.append(box, swatch(color), name);
    $("classes").append(row);
  }
  $("classes").hidden = !document.querySelector("#classes label");
}

function swatch(color) {
  const square = document.createElement("span");
  square.className = "swatch";
  square.style.background = color;
  return square;
}

function draw() {
  if (!shown) return;
  $("shown-threshold").textContent = Number($("threshold").value).toFixed(2);
  const found = chosen();
  $("count").textContent = `${found.length} of ${shown.detections.length} detections`;
  $("boxes").setAttribute("viewBox", `0 0 ${shown.width} ${shown.height}`);
  $("boxes").replaceChildren();
  $("rows").replaceChildren();
  const scale = shown.width / ($("image").clientWidth || shown.width); // image pixels per pixel of the screen
  for (const d of found) {
    const { name, color } = model.classes[d.label];
    const [x1, y1, x2, y2] = d.box;
    const group = element("g", {});
    group.append(element("rect", { x: x1, y: y1, width: x2 - x1, height: y2 - y1, stroke: color }));
    $("boxes").prepend(group); // the best on top
    addTag(group, `${name} ${d.score.toFixed(2)}`, x1, y1, color, model.classes[d.label].text, scale);
    const row = $("rows").insertRow();
    const cell = row.insertCell();
    cell.append(swatch(color), ` ${name}`);
    cell.title = name;
    row.insertCell().textContent = d.score.toFixed(3);
    row.insertCell().textContent = `${Math.round(x1)}, ${Math.round(y1)}`;
    row.insertCell().textContent = `${Math.round(x2 - x1)} × ${Math.round(y2 - y1)}`;
    row.addEventListener("mouseenter", () => highlight(group));
    row.addEventListener("mouseleave", () => highlight(null));
  }
}

function addTag(group, text, x, y, color, textColor, scale) {
  const size = 12 * scale;
  const top = y >= 1.4 * size ? y - 1.4 * size : y;
  const label = element("text", { y: top + 1.05 * size, "font-size": size, fill: textColor });
  label.setAttribute("font-family", "system-ui, sans-serif");
  label.textContent = text;
  group.append(label); // a text that is not shown has no length
  const width = label.getComputedTextLength() + 0.6 * size;
  const left = inside(x, width);
  label.setAttribute("x", left + 0.3 * size);
  const back = element("rect", { x: left, y: top, width, height: 1.4 * size, class: "tag" });
  back.style.fill = color;
  label.before(back);
}

// Where something `width` wide begins so that it does not leave the image to the right.
function inside(x, width) {
  return Math.max(0, Math.min(x, shown.width - width));
}

function element(name, attributes) {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  return node;
}

function highlight(group) {
  for (const other of $("boxes").children) {
    other.classList.toggle("chosen", other === group);
    other.classList.toggle("dimmed", group !== null && other !== group);
  }
}

function download(blob, name) {
  const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

function saveJson() {
  const records = chosen().map((d) => ({
    file_name: shown.name,
    image_id: 1,
    category_id: model.classes[d.label].id,
    category_name: model.classes[d.label].name,
    bbox: [d.box[0], d.box[1], d.box[2] - d.box[0], d.box[3] - d.box[1]],
    score: d.score,
  }));
  download(new Blob([JSON.stringify(records, null, 1)], { type: "application/json" }), `${shown.name}.json`);
}

function savePicture() {
  const canvas = Object.assign(document.createElement("canvas"), { width: shown.width, height: shown.height });
  const paint = canvas.getContext("2d");
  paint.drawImage($("image"), 0, 0, shown.width, shown.height);
  const size = Math.max(12, Math.round(Math.min(shown.width, shown.height) / 36));
  paint.font = `${size}px system-ui, sans-serif`;
  paint.lineWidth = Math.max(2, Math.round(size / 6));
  for (const d of chosen().reverse()) {
    const { name, color, text } = model.classes[d.label];
    const [x1, y1, x2, y2] = d.box;
    const words = `${name} ${d.score.toFixed(2)}`;
    const top = y1 >= 1.4 * size ? y1 - 1.4 * size : y1;
    paint.strokeStyle = paint.fillStyle = color;
    paint.strokeRect(x1, y1, x2 - x1, y2 - y1);
    const width = paint.measureText(words).width + 0.6 * size;
    const left = inside(x1, width);
    paint.fillRect(left, top, width, 1.4 * size);
    paint.fillStyle = text;
    paint.fillText(words, left + 0.3 * size, top + 1.05 * size);
  }
  canvas.toBlob((blob) => download(blob, `${shown.name}.boxes.png`));
}

$("file").addEventListener("change", () => {
  open($("file").files[0]);
  $("file").value = ""; // so that the same file can be chosen again
});
$("drop").addEventListener("keydown", (event) => {
  if (event.key === "Enter" || event.key === " ") $("file").click();
});
$("threshold").addEventListener("input", draw);
$("json").addEventListener("click", saveJson);
$("picture").addEventListener("click", savePicture);
$("another").addEventListener("click", () => $("file").click());
addEventListener("resize", draw);
addEventListener("paste", (event) => open(event.clipboardData.files[0]));
addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("over");
});
addEventListener("dragleave", () => document.body.classList.remove("over"));
addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("over");
  if (event.dataTransfer.files.length) open(event.dataTransfer.files[0]);
  else say("that is no file; drop an image file", true);
});
