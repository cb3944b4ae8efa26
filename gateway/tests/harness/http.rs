//! HTTP/1.1 by hand, so that what is on the wire is what is tested.

use super::within;
use serde_json::Value;
use std::collections::HashMap;
use std::net::SocketAddr;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::TcpStream;

/// An answer whose body is still to be read.
pub struct Answer {
    pub status: u16,
    /// Names in lower case.
    pub headers: HashMap<String, String>,
    connection: BufReader<TcpStream>,
    /// Of the body, not yet given.
    unread: String,
}

/// Sends a request over a connection of its own, without waiting for the answer.
pub async fn send(
    address: SocketAddr,
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: &str,
) -> BufReader<TcpStream> {
    let mut connection = TcpStream::connect(address).await.unwrap();
    let mut head = format!("{method} {path} HTTP/1.1\r\nhost: {address}\r\ncontent-length: {}\r\n", body.len());
    for (name, value) in headers {
        head += &format!("{name}: {value}\r\n");
    }
    // The gateway may refuse before it has read everything.
    let _ = connection.write_all(format!("{head}\r\n{body}").as_bytes()).await;
    BufReader::new(connection)
}

pub async fn ask(address: SocketAddr, method: &str, path: &str, headers: &[(&str, &str)], body: &str) -> Answer {
    Answer::read(send(address, method, path, headers, body).await).await
}

pub async fn get(address: SocketAddr, path: &str) -> Answer {
    ask(address, "GET", path, &[], "").await
}

pub async fn post(address: SocketAddr, path: &str, body: Value) -> Answer {
    ask(address, "POST", path, &[("content-type", "application/json")], &body.to_string()).await
}

impl Answer {
    /// Reads the head.
    pub async fn read(mut connection: BufReader<TcpStream>) -> Answer {
        let first = line(&mut connection).await;
        let status = first.split(' ').nth(1).unwrap_or_else(|| panic!("{first:?}")).parse().unwrap();
        let mut headers = HashMap::new();
        loop {
            let line = line(&mut connection).await;
            let Some((name, value)) = line.split_once(": ") else { break };
            headers.insert(name.to_lowercase(), value.to_owned());
        }
        Answer { status, headers, connection, unread: String::new() }
    }

    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", String::as_str)
    }

    /// The next piece of a body in chunks.
    async fn piece(&mut self) -> Option<String> {
        let size = usize::from_str_radix(&line(&mut self.connection).await, 16).unwrap();
        let mut piece = vec![0; size + 2];
        within(self.connection.read_exact(&mut piece)).await.unwrap();
        (size > 0).then(|| String::from_utf8(piece[..size].to_vec()).unwrap())
    }

    /// The data of the next event; `None` at the end of the stream.
    pub async fn event(&mut self) -> Option<String> {
        loop {
            if let Some((event, rest)) = self.unread.split_once("\n\n") {
                let data = event.strip_prefix("data: ").unwrap_or_else(|| panic!("{event:?}")).to_owned();
                assert!(!data.contains('\n'), "{data:?}");
                self.unread = rest.to_owned();
                return Some(data);
            }
            match self.piece().await {
                Some(piece) => self.unread += &piece,
                None => {
                    assert_eq!(self.unread, "", "an event without its end");
                    return None;
                }
            }
        }
    }

    /// The data of all events.
    pub async fn events(mut self) -> Vec<String> {
        let mut all = Vec::new();
        while let Some(event) = self.event().await {
            all.push(event);
        }
        all
    }

    /// The body as JSON.
    pub async fn json(mut self) -> Value {
        assert_eq!(self.header("content-type"), "application/json");
        let mut body = vec![0; self.header("content-length").parse().unwrap()];
        within(self.connection.read_exact(&mut body)).await.unwrap();
        serde_json::from_slice(&body).unwrap()
    }

    /// The status and the error object.
    pub async fn error(self) -> (u16, Value) {
        (self.status, self.json().await["error"].clone())
    }
}

async fn line(connection: &mut BufReader<TcpStream>) -> String {
    let mut line = String::new();
    within(connection.read_line(&mut line)).await.unwrap();
    line.trim_end().to_owned()
}
