//! Clients for buckets from the environment, read as the providers' own tools read it.
//!
//! S3: `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_SESSION_TOKEN`, `AWS_REGION`,
//! `AWS_DEFAULT_REGION`, `AWS_ENDPOINT_URL[_S3]`, web identity, container and instance roles,
//! `AWS_SKIP_SIGNATURE` or `AWS_NO_SIGN_REQUEST`, `AWS_CA_BUNDLE`; where no key is set, the profile
//! files (`profile`). GCS: `GOOGLE_*`, application default credentials, `STORAGE_EMULATOR_HOST`.
//! Azure: `AZURE_*`, `AZURE_STORAGE_CONNECTION_STRING`. Proxies and root certificates:
//! `HTTPS_PROXY`, `NO_PROXY`, `SSL_CERT_FILE`, `SSL_CERT_DIR`, by the HTTP client.

mod profile;

use std::{env, fs, sync::Arc, time::Duration};

use object_store::{
    Certificate, ClientConfigKey, RetryConfig, StaticCredentialProvider,
    aws::{AmazonS3, AmazonS3Builder, AmazonS3ConfigKey as S3Key, AwsCredential},
    azure::{AzureConfigKey, MicrosoftAzure, MicrosoftAzureBuilder},
    gcp::{GoogleCloudStorage, GoogleCloudStorageBuilder, GoogleConfigKey},
};

use super::{
    super::{AwsKeys, Config, SourceError, SourceErrorKind, install_tls},
    transport::Connector,
};

/// A client for the S3 bucket `bucket`, and where it is; with `keys` instead of those of the environment.
pub(super) fn s3(
    bucket: &str,
    config: &Config,
    keys: Option<&AwsKeys>,
) -> Result<(AmazonS3, String), SourceError> {
    let what = format!("s3://{bucket}");
    let mut builder = AmazonS3Builder::from_env().with_bucket_name(bucket);
    if truthy("AWS_NO_SIGN_REQUEST") {
        builder = builder.with_skip_signature(true);
    }
    if let Some(keys) = keys {
        let own = AwsCredential {
            key_id: keys.access_key_id.expose().to_owned(),
            secret_key: keys.secret_access_key.expose().to_owned(),
            token: keys.session_token.as_ref().map(|t| t.expose().to_owned()),
        };
        builder = builder
            .with_skip_signature(false)
            .with_credentials(Arc::new(StaticCredentialProvider::new(own)));
    }
    let get = |builder: &AmazonS3Builder, key| builder.get_config_value(&key);
    let anonymous = get(&builder, S3Key::SkipSignature).is_some_and(|v| is_true(&v));
    let configured = keys.is_some()
        || anonymous
        || [
            S3Key::AccessKeyId,
            S3Key::SecretAccessKey,
            S3Key::WebIdentityTokenFile,
            S3Key::ContainerCredentialsRelativeUri,
            S3Key::ContainerCredentialsFullUri,
        ]
        .into_iter()
        .any(|key| get(&builder, key).is_some());
    let profile = profile::load();
    if !configured {
        if let Some(keys) = profile::Keys::of(&profile) {
            builder = builder.with_credentials(Arc::new(keys));
        } else if truthy("AWS_EC2_METADATA_DISABLED") {
            return Err(SourceError::new(
                SourceErrorKind::Denied,
                what,
                "no credentials, and AWS_EC2_METADATA_DISABLED is set",
            )
            .with_hint(
                "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_SKIP_SIGNATURE=true",
            ));
        }
    }
    if let (None, Some(region)) = (get(&builder, S3Key::Region), &profile.region) {
        builder = builder.with_region(region);
    }
    let mut endpoint = get(&builder, S3Key::S3Endpoint).or_else(|| get(&builder, S3Key::Endpoint));
    if let (None, Some(url)) = (&endpoint, &profile.endpoint_url) {
        builder = builder.with_endpoint(url);
        endpoint = Some(url.clone());
    }
    let virtual_hosted = env::var_os("AWS_VIRTUAL_HOSTED_STYLE_REQUEST").is_some();
    let place = match &endpoint {
        Some(endpoint) => {
            check_endpoint(&what, endpoint)?;
            without_scheme(endpoint).to_owned()
        }
        None => {
            // Names with dots do not fit the certificate of virtual hosts.
            if !virtual_hosted {
                builder = builder.with_virtual_hosted_style_request(!bucket.contains('.'));
            }
            let region = get(&builder, S3Key::Region).unwrap_or_else(|| "us-east-1".to_owned());
            format!("s3.{region}.amazonaws.com")
        }
    };
    for (key, value) in client_options(config, endpoint.as_deref()) {
        builder = builder.with_config(S3Key::Client(key), value);
    }
    let store = builder
        .with_retry(no_retry())
        .with_http_connector(connector(&what)?)
        .build()
        .map_err(|e| unusable(&what, &e))?;
    Ok((store, place))
}

/// A client for the Google Cloud Storage bucket `bucket`, and where it is.
pub(super) fn gcs(
    bucket: &str,
    config: &Config,
) -> Result<(GoogleCloudStorage, String), SourceError> {
    let what = format!("gs://{bucket}");
    let mut builder = GoogleCloudStorageBuilder::from_env().with_bucket_name(bucket);
    if let Ok(host) = env::var("STORAGE_EMULATOR_HOST")
        && !host.is_empty()
    {
        let url = if host.contains("://") {
            host
        } else {
            format!("http://{host}")
        };
        builder = builder
            .with_config(GoogleConfigKey::BaseUrl, url.trim_end_matches('/'))
            .with_config(GoogleConfigKey::SkipSignature, "true");
    }
    let endpoint = builder.get_config_value(&GoogleConfigKey::BaseUrl);
    let place = match &endpoint {
        Some(endpoint) => {
            check_endpoint(&what, endpoint)?;
            without_scheme(endpoint).to_owned()
        }
        None => "storage.googleapis.com".to_owned(),
    };
    for (key, value) in client_options(config, endpoint.as_deref()) {
        builder = builder.with_config(GoogleConfigKey::Client(key), value);
    }
    let store = builder
        .with_retry(no_retry())
        .with_http_connector(connector(&what)?)
        .build()
        .map_err(|e| unusable(&what, &e))?;
    Ok((store, place))
}

/// A client for the Azure Blob Storage container `container`, and where it is.
pub(super) fn azure(
    container: &str,
    config: &Config,
) -> Result<(MicrosoftAzure, String), SourceError> {
    let what = format!("az://{container}");
    let mut builder = MicrosoftAzureBuilder::from_env().with_container_name(container);
    // Names that the Azure CLI reads and `object_store` does not.
    for (name, key) in [
        ("AZURE_STORAGE_ACCOUNT", AzureConfigKey::AccountName),
        ("AZURE_STORAGE_KEY", AzureConfigKey::AccessKey),
        ("AZURE_STORAGE_SAS_TOKEN", AzureConfigKey::SasKey),
    ] {
        if let (Ok(value), None) = (env::var(name), builder.get_config_value(&key)) {
            builder = builder.with_config(key, value);
        }
    }
    if let Ok(text) = env::var("AZURE_STORAGE_CONNECTION_STRING") {
        for (key, value) in connection_string(&text) {
            builder = builder.with_config(key, value);
        }
    }
    let get = |builder: &MicrosoftAzureBuilder, key| builder.get_config_value(&key);
    let account = get(&builder, AzureConfigKey::AccountName);
    let emulated = get(&builder, AzureConfigKey::UseEmulator).is_some_and(|v| is_true(&v));
    let endpoint = if emulated {
        let url = env::var("AZURITE_BLOB_STORAGE_URL");
        let url = url.unwrap_or_else(|_| "http://127.0.0.1:10000".to_owned());
        let account = account.unwrap_or_else(|| "devstoreaccount1".to_owned());
        format!("{}/{account}", url.trim_end_matches('/'))
    } else {
        let Some(account) = account else {
            return Err(SourceError::new(
                SourceErrorKind::Invalid,
                what,
                "no storage account is set",
            )
            .with_hint("set AZURE_STORAGE_ACCOUNT_NAME, or AZURE_STORAGE_CONNECTION_STRING"));
        };
        get(&builder, AzureConfigKey::Endpoint)
            .unwrap_or_else(|| format!("https://{account}.blob.core.windows.net"))
    };
    check_endpoint(&what, &endpoint)?;
    for (key, value) in client_options(config, Some(&endpoint)) {
        builder = builder.with_config(AzureConfigKey::Client(key), value);
    }
    let store = builder
        .with_retry(no_retry())
        .with_http_connector(connector(&what)?)
        .build()
        .map_err(|e| unusable(&what, &e))?;
    Ok((store, without_scheme(&endpoint).to_owned()))
}

/// The parts of an Azure connection string that matter for reading blobs.
fn connection_string(text: &str) -> Vec<(AzureConfigKey, String)> {
    let part = |wanted: &str| {
        text.split(';').find_map(|part| {
            let (name, value) = part.split_once('=')?;
            name.trim()
                .eq_ignore_ascii_case(wanted)
                .then(|| value.trim().to_owned())
        })
    };
    let account = part("AccountName");
    let endpoint = part("BlobEndpoint").or_else(|| {
        let suffix = part("EndpointSuffix")?;
        let protocol = part("DefaultEndpointsProtocol").unwrap_or_else(|| "https".to_owned());
        Some(format!("{protocol}://{}.blob.{suffix}", account.clone()?))
    });
    let emulated = part("UseDevelopmentStorage")
        .filter(|v| is_true(v))
        .map(|_| "true".to_owned());
    [
        (AzureConfigKey::AccountName, account),
        (AzureConfigKey::AccessKey, part("AccountKey")),
        (AzureConfigKey::SasKey, part("SharedAccessSignature")),
        (AzureConfigKey::Endpoint, endpoint),
        (AzureConfigKey::UseEmulator, emulated),
    ]
    .into_iter()
    .filter_map(|(key, value)| Some((key, value?)))
    .collect()
}

/// Settings of the HTTP client. There is no limit on the whole of a request: bodies may be large,
/// and a stall is noticed by the time between two reads. HTTP/1.1 only (the default of
/// `object_store`): one connection for each range is faster than one shared by all.
fn client_options(config: &Config, endpoint: Option<&str>) -> Vec<(ClientConfigKey, String)> {
    let seconds = |time: Duration| format!("{} seconds", time.as_secs());
    let mut options = vec![
        (
            ClientConfigKey::ConnectTimeout,
            seconds(config.connect_timeout()),
        ),
        (
            ClientConfigKey::ReadTimeout,
            seconds(config.stall_timeout()),
        ),
        (
            ClientConfigKey::PoolMaxIdlePerHost,
            config.idle_connections.to_string(),
        ),
        (
            ClientConfigKey::UserAgent,
            concat!("hearth/", env!("CARGO_PKG_VERSION")).to_owned(),
        ),
    ];
    if endpoint.is_some_and(|url| url.starts_with("http://")) {
        options.push((ClientConfigKey::AllowHttp, "true".to_owned()));
    }
    options
}

fn no_retry() -> RetryConfig {
    RetryConfig {
        max_retries: 0,
        ..RetryConfig::default()
    }
}

/// The connector, with the certificates of `AWS_CA_BUNDLE`.
fn connector(what: &str) -> Result<Connector, SourceError> {
    install_tls();
    let mut roots = Vec::new();
    if let Some(bundle) = env::var_os("AWS_CA_BUNDLE")
        && what.starts_with("s3:")
        && !bundle.is_empty()
    {
        let refuse = || {
            let message = format!("the certificates of AWS_CA_BUNDLE={bundle:?} cannot be used");
            SourceError::new(SourceErrorKind::Invalid, what, message)
        };
        let pem = fs::read(&bundle).map_err(|e| refuse().because(e))?;
        roots = Certificate::from_pem_bundle(&pem).map_err(|_| refuse())?;
    }
    Ok(Connector {
        roots,
        as_stored: what.starts_with("gs:"),
    })
}

fn check_endpoint(what: &str, endpoint: &str) -> Result<(), SourceError> {
    let refuse = |why: &str| Err(SourceError::new(SourceErrorKind::Invalid, what, why));
    match url::Url::parse(endpoint) {
        Ok(url) if !matches!(url.scheme(), "http" | "https") || !url.has_host() => {
            refuse("the endpoint set for it is not an http:// or https:// URL")
        }
        Ok(url) if !url.username().is_empty() || url.password().is_some() => {
            refuse("the endpoint set for it has user info; set credentials by their own variables")
        }
        Ok(_) => Ok(()),
        Err(_) => refuse("the endpoint set for it is not a URL"),
    }
}

fn without_scheme(url: &str) -> &str {
    let rest = url.split_once("://").map_or(url, |(_, rest)| rest);
    rest.split(['?', '#'])
        .next()
        .unwrap_or(rest)
        .trim_end_matches('/')
}

fn truthy(name: &str) -> bool {
    env::var(name).is_ok_and(|value| is_true(&value))
}

fn is_true(value: &str) -> bool {
    matches!(
        value.to_ascii_lowercase().as_str(),
        "1" | "true" | "yes" | "on" | "y" | "t"
    )
}

/// Settings that no client can be built from. Their texts may quote a setting, so none is shown
/// but what is safe by its kind.
fn unusable(what: &str, error: &object_store::Error) -> SourceError {
    let message = match error {
        object_store::Error::UnknownConfigurationKey { key, .. } => {
            format!("unknown setting {key}")
        }
        _ => "the settings for it in the environment cannot be used".to_owned(),
    };
    SourceError::new(SourceErrorKind::Invalid, what, message).with_hint(
        "check that AWS_*, GOOGLE_* or AZURE_* variables are complete and that the files they name \
         can be read",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connection_strings_are_taken_apart() {
        let get = |text: &str| -> Vec<String> {
            let parts = connection_string(text);
            parts
                .into_iter()
                .map(|(key, value)| format!("{key:?}={value}"))
                .collect()
        };
        assert_eq!(
            get(
                "DefaultEndpointsProtocol=https;AccountName=acc;AccountKey=a+b/c==;EndpointSuffix=core.windows.net"
            ),
            [
                "AccountName=acc",
                "AccessKey=a+b/c==",
                "Endpoint=https://acc.blob.core.windows.net"
            ]
        );
        assert_eq!(
            get("blobendpoint=https://x/y;SharedAccessSignature=sv=1&sig=2"),
            ["SasKey=sv=1&sig=2", "Endpoint=https://x/y"]
        );
        assert_eq!(get("UseDevelopmentStorage=true"), ["UseEmulator=true"]);
        assert!(get(";;=;nonsense").is_empty());
    }

    #[test]
    fn endpoints_are_checked_and_secrets_not_shown() {
        assert!(check_endpoint("s3://b", "http://127.0.0.1:9000/path").is_ok());
        for bad in [
            "",
            "host:9000",
            "ftp://h",
            "http://",
            "http://user:SECRET@h",
        ] {
            let error = check_endpoint("s3://b", bad).unwrap_err();
            assert_eq!(error.kind(), SourceErrorKind::Invalid);
            assert!(!format!("{error:?}").contains("SECRET"));
        }
        assert_eq!(without_scheme("https://h:1/a/?x=SECRET"), "h:1/a");
    }
}
