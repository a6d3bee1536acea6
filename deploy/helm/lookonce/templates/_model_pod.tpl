{{- /* The pod of a model service: a Deployment's, or the leader's or a worker's of a group that Ray joins. */}}
{{- define "lookonce.modelPod" -}}
{{- $root := .root }}{{ $model := .model }}{{ $part := .part }}{{ $settings := .settings }}{{ $name := .name }}{{ $port := .port }}
{{- $engine := .engine }}{{ $nodes := .nodes }}{{ $ray := .ray }}
{{- $prefix := ternary "LOOKONCE_VISION_" "LOOKONCE_LM_" (eq $part "vision") }}
{{- $vllm := $settings.vllm | default dict }}
metadata:
  labels:
    {{- include "lookonce.labels" $root | nindent 4 }}
    app.kubernetes.io/component: {{ $part }}{{ if eq $ray "worker" }}-worker{{ end }}
    lookonce.dev/model: {{ $model.name }}
  {{- if ne $ray "worker" }}
  annotations:
    prometheus.io/scrape: "true"
    prometheus.io/port: "9090"
  {{- end }}
spec:
  automountServiceAccountToken: false
  enableServiceLinks: false
  terminationGracePeriodSeconds: {{ $root.Values.terminationGracePeriodSeconds }}
  securityContext: {{- include "lookonce.podSecurity" $root | nindent 4 }}
  {{- with $root.Values.image.pullSecrets }}
  imagePullSecrets:
    {{- range . }}
    - name: {{ . }}
    {{- end }}
  {{- end }}
  {{- include "lookonce.placing" $settings | nindent 2 }}
  containers:
    - name: {{ $part }}
      image: {{ include "lookonce.image" (dict "root" $root "part" $part "variant" $settings.variant "engine" $engine) | quote }}
      imagePullPolicy: {{ $root.Values.image.pullPolicy }}
      securityContext: {{- include "lookonce.containerSecurity" $root | nindent 8 }}
      {{- if eq $ray "leader" }}
      # As vLLM's own script for several nodes does: the head of a Ray cluster, then the service once all have joined.
      command: [sh, -ec]
      args:
        - |
          ray start --head --port=6379 --disable-usage-stats
          until python -c 'import ray; ray.init(address="auto", log_to_driver=False); raise SystemExit(sum(node["Alive"] for node in ray.nodes()) < {{ $nodes }})'; do sleep 5; done
          exec python -m lm_service
      {{- else if eq $ray "worker" }}
      command: [sh, -ec]
      args:
        - |
          until ray start --address="$LWS_LEADER_ADDRESS:6379" --disable-usage-stats --block; do sleep 5; done
      {{- end }}
      env:
        - {name: {{ $prefix }}MODEL, value: {{ required "models[].model is required" $model.model | quote }}}
        {{- with $model.revision }}
        - {name: {{ $prefix }}REVISION, value: {{ . | quote }}}
        {{- end }}
        - {name: {{ $prefix }}LISTEN, value: "0.0.0.0:{{ $port }}"}
        - {name: {{ $prefix }}METRICS_LISTEN, value: "0.0.0.0:9090"}
        {{- if $settings.deviceMap }}
        - {name: {{ $prefix }}DEVICE_MAP, value: {{ $settings.deviceMap | quote }}}
        {{- else }}
        - {name: {{ $prefix }}DEVICE, value: {{ $settings.device | quote }}}
        {{- end }}
        - {name: {{ $prefix }}DTYPE, value: {{ $settings.dtype | quote }}}
        - {name: {{ $prefix }}GRACE, value: "{{ $root.Values.drainSeconds }}s"}
        - {name: {{ $prefix }}STORE_TTL, value: {{ $root.Values.store.ttl | quote }}}
        {{- if eq $part "language" }}
        - {name: LOOKONCE_LM_VISION, value: {{ include "lookonce.addresses" (dict "root" $root "model" $model.name "part" "vision" "port" 50051) | trimPrefix "dns://" | quote }}}
        {{- end }}
        {{- if $root.Values.tls.enabled }}
        - {name: {{ $prefix }}TLS_CERTIFICATE, value: /etc/lookonce-tls/tls.crt}
        - {name: {{ $prefix }}TLS_KEY, value: /etc/lookonce-tls/tls.key}
        {{- if $root.Values.tls.mutual }}
        - {name: {{ $prefix }}TLS_CA, value: /etc/lookonce-tls/ca.crt}
        {{- end }}
        {{- if eq $part "language" }}
        - {name: LOOKONCE_LM_VISION_TLS_CA, value: /etc/lookonce-tls/ca.crt}
        {{- end }}
        {{- end }}
        {{- include "lookonce.storeEnv" (dict "root" $root "prefix" $prefix) | indent 8 }}
        {{- with $root.Values.hub.existingSecret }}
        - name: HF_TOKEN
          valueFrom: {secretKeyRef: {name: {{ . | quote }}, key: token}}
        {{- end }}
        {{- if eq $engine "vllm" }}
        - {name: LOOKONCE_LM_ENGINE, value: vllm}
        - {name: LOOKONCE_LM_TENSOR_PARALLEL, value: {{ $vllm.tensorParallel | default 1 | quote }}}
        - {name: LOOKONCE_LM_PIPELINE_PARALLEL, value: {{ $vllm.pipelineParallel | default 1 | quote }}}
        - {name: LOOKONCE_LM_GPU_MEMORY_SHARE, value: {{ $vllm.gpuMemoryShare | default "0.9" | quote }}}
        {{- if gt $nodes 1 }}
        - {name: LOOKONCE_LM_ENGINE_ARGS, value: {{ dict "distributed_executor_backend" "ray" | toJson | quote }}}
        - name: VLLM_HOST_IP
          valueFrom: {fieldRef: {fieldPath: status.podIP}}
        {{- end }}
        {{- end }}
        {{- include "lookonce.env" $settings.env | indent 8 }}
      {{- if ne $ray "worker" }}
      ports:
        - {name: grpc, containerPort: {{ $port }}}
        - {name: metrics, containerPort: 9090}
      # It listens once the weights are loaded; downloading them may take long.
      startupProbe:
        {{- include "lookonce.rpcProbe" (dict "root" $root "port" $port "name" $name) | nindent 8 }}
        failureThreshold: 360
      readinessProbe:
        {{- include "lookonce.rpcProbe" (dict "root" $root "port" $port "name" $name) | nindent 8 }}
        failureThreshold: 2
      livenessProbe:
        tcpSocket: {port: grpc}
        periodSeconds: 10
        failureThreshold: 3
      lifecycle:
        preStop: {sleep: {seconds: 5}}
      {{- else }}
      readinessProbe:
        exec: {command: [ray, status]}
        periodSeconds: 30
        timeoutSeconds: 20
      livenessProbe:
        exec: {command: [ray, status]}
        periodSeconds: 60
        timeoutSeconds: 30
        failureThreshold: 5
      {{- end }}
      resources: {{- toYaml $settings.resources | nindent 8 }}
      volumeMounts:
        - {name: models, mountPath: /models, readOnly: {{ $root.Values.models_volume.readOnly }}}
        - {name: tmp, mountPath: /tmp}
        {{- if eq $engine "vllm" }}
        - {name: shared-memory, mountPath: /dev/shm}
        {{- end }}
        {{- if $root.Values.tls.enabled }}
        - {name: tls, mountPath: /etc/lookonce-tls, readOnly: true}
        {{- end }}
  volumes:
    {{- if $root.Values.tls.enabled }}
    {{- include "lookonce.tlsVolume" (dict "root" $root "part" $part "model" $model.name) | nindent 4 }}
    {{- end }}
    - name: tmp
      emptyDir: {sizeLimit: 1Gi}
    {{- if eq $engine "vllm" }}
    - name: shared-memory
      emptyDir: {medium: Memory, sizeLimit: {{ $vllm.sharedMemory | default "8Gi" }}}
    {{- end }}
    - name: models
      {{- if $root.Values.models_volume.existingClaim }}
      persistentVolumeClaim: {claimName: {{ $root.Values.models_volume.existingClaim }}}
      {{- else }}
      emptyDir: {sizeLimit: {{ $root.Values.models_volume.sizeLimit }}}
      {{- end }}
{{- end }}
