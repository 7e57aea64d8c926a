// What goes with the next message: pictures from files or pasted, and recordings.

import { picturePart, Recorder } from "/page/media.js";

export const PICTURES = ["image/png", "image/jpeg", "image/webp"];
const MOST_SECONDS = 30;

export class Attachments {
  #list = []; // {part, name}
  #recorder = null;

  // `list` shows them, `button` records, `tell` is handed what the user should know.
  constructor(list, button, tell) {
    this.list = list;
    this.button = button;
    this.tell = tell;
    button.addEventListener("click", () => (this.#recorder ? this.#endRecording() : this.#record()));
  }

  get parts() {
    return this.#list.map((one) => one.part);
  }

  get names() {
    return this.#list.map((one) => one.name);
  }

  // Returns what is there, which is there no more.
  take() {
    const list = this.#list;
    this.#show([]);
    return list;
  }

  putBack(list) {
    this.#show([...list, ...this.#list]);
  }

  // Ends a recording too: nobody is to be heard whose button to stop it is gone.
  drop() {
    this.#show([]);
    this.#recorder?.cancel();
    this.#recorder = null;
    this.#label("Record");
  }

  async addPictures(files) {
    for (const file of files) {
      if (!PICTURES.includes(file.type)) {
        this.tell(`${file.name} is no PNG, JPEG or WebP.`);
        continue;
      }
      const part = await picturePart(file); // meanwhile the list may change
      this.#show([...this.#list, { part, name: file.name }]);
    }
  }

  #show(list) {
    this.#list = list;
    this.list.replaceChildren(
      ...list.map((one) => {
        const item = document.createElement("li");
        const remove = document.createElement("button");
        remove.type = "button";
        remove.textContent = `${one.name}: remove`;
        remove.addEventListener("click", () => this.#show(this.#list.filter((other) => other !== one)));
        if (one.part.image_url) {
          const image = new Image();
          image.src = one.part.image_url.url;
          image.alt = "";
          item.append(image);
        }
        item.append(remove);
        return item;
      }),
    );
  }

  async #record() {
    const recorder = new Recorder();
    this.#recorder = recorder;
    this.#label("Stop recording");
    try {
      await recorder.start((seconds) => {
        if (this.#recorder !== recorder) return;
        this.#label(`Stop recording, ${seconds} s`);
        if (seconds >= MOST_SECONDS) this.#endRecording();
      });
    } catch (error) {
      if (this.#recorder !== recorder) return;
      this.#recorder = null;
      this.#label("Record");
      this.tell(`The microphone cannot be used: ${error.message}.`);
    }
  }

  async #endRecording() {
    const recorder = this.#recorder;
    if (!recorder?.isRecording) return; // the browser is still asking whether it may
    this.#recorder = null;
    this.#label("Record");
    try {
      const part = await recorder.stop();
      this.#show([...this.#list, { part, name: "recording" }]);
    } catch (error) {
      this.tell(`The recording cannot be read: ${error.message}.`);
    }
  }

  #label(text) {
    this.button.textContent = text;
    this.button.setAttribute("aria-pressed", this.#recorder ? "true" : "false");
  }
}
