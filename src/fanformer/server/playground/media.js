// Pictures and recordings as OpenAI's message parts have them: data URLs, and mono WAV of 16 kHz made here.

const RATE = 16000;

function dataUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
}

export async function picturePart(file) {
  return { type: "image_url", image_url: { url: await dataUrl(file) } };
}

// Returns 16-bit WAV of samples in [-1, 1].
export function wav(samples, rate) {
  const view = new DataView(new ArrayBuffer(44 + 2 * samples.length));
  const word = (place, text) => [...text].forEach((letter, i) => view.setUint8(place + i, letter.charCodeAt(0)));
  word(0, "RIFF");
  view.setUint32(4, 36 + 2 * samples.length, true);
  word(8, "WAVEfmt ");
  view.setUint32(16, 16, true);
  view.setUint16(20, 1, true); // PCM
  view.setUint16(22, 1, true); // mono
  view.setUint32(24, rate, true);
  view.setUint32(28, 2 * rate, true);
  view.setUint16(32, 2, true);
  view.setUint16(34, 16, true);
  word(36, "data");
  view.setUint32(40, 2 * samples.length, true);
  samples.forEach((value, i) => view.setInt16(44 + 2 * i, 32767 * Math.max(-1, Math.min(1, value)), true));
  return new Blob([view.buffer], { type: "audio/wav" });
}

export class Recorder {
  get isRecording() {
    return this.recorder?.state === "recording";
  }

  // Begins; `tell` hears the seconds that are recorded, once each.
  async start(tell) {
    if (!navigator.mediaDevices) throw new Error("a page has one over https or on this machine only");
    this.source = await navigator.mediaDevices.getUserMedia({ audio: true });
    if (this.isCancelled) return this.cancel();
    this.pieces = [];
    this.recorder = new MediaRecorder(this.source);
    this.recorder.ondataavailable = (event) => {
      this.pieces.push(event.data);
      if (this.isRecording) tell(this.pieces.length);
    };
    this.recorder.start(1000);
  }

  // Ends it, and keeps nothing.
  cancel() {
    this.isCancelled = true;
    if (this.isRecording) this.recorder.stop();
    this.source?.getTracks().forEach((track) => track.stop());
  }

  // Ends the recording and returns its message part.
  async stop() {
    await new Promise((resolve) => {
      this.recorder.onstop = resolve;
      this.recorder.stop();
    });
    this.source.getTracks().forEach((track) => track.stop());
    const coded = await new Blob(this.pieces).arrayBuffer();
    const context = new OfflineAudioContext(1, 1, RATE); // decodes to its own rate
    const decoded = await context.decodeAudioData(coded);
    const mixed = new Float32Array(decoded.length);
    for (let channel = 0; channel < decoded.numberOfChannels; channel++) {
      decoded.getChannelData(channel).forEach((value, i) => (mixed[i] += value / decoded.numberOfChannels));
    }
    const url = await dataUrl(wav(mixed, RATE));
    return { type: "input_audio", input_audio: { data: url.slice(url.indexOf(",") + 1), format: "wav" } };
  }
}
